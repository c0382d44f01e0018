"""A host behind a NAT and one in the open that speak IPsec in transport mode (RFC 3948 section 3.1.2): both know the first by different addresses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.capture import Capture
from lab.daemon import Daemon
from lab.pairing import DaemonFactory
from lab.process import LabError
from lab.topology import WAN, Site, sites
from lab.traffic import UdpStream, ping, tcp_bulk, tcp_server, udp_sink

HIDE: Final = "add table ip hide; add chain ip hide out { type nat hook postrouting priority 100; };"
CONFIG: Final = """connections {{
  open {{
    version = 2
    local_addrs = {local}
    remote_addrs = {remote}
    proposals = aes128-sha256-x25519
    local {{
      auth = psk
      id = {name}
    }}
    remote {{
      auth = psk
      id = {peer}
    }}
    children {{
      net {{
        mode = transport
        esp_proposals = aes128gcm16
        local_ts = dynamic
        remote_ts = dynamic
      }}
    }}
  }}
}}
secrets {{
  ike-all {{
    secret = "behind a NAT"
  }}
}}
"""


def _write(directory: Path, **words: str) -> Path:
    directory.mkdir(parents=True)
    path = directory / "swanctl.conf"
    path.write_text(CONFIG.format(**words))
    return path


@dataclass(frozen=True, slots=True)
class Hidden:
    """Host A with the daemon `a` on it, its router that hides it, and `b` on gateway B. `wire` is between the two routers."""

    near: Site
    far: Site
    a: Daemon
    b: Daemon
    wire: Capture

    def carries(self, *, bulk: int = 4 << 20, rate: float = 500.0) -> None:
        """Ping, TCP and datagrams, complete and intact, and nothing in clear: checksums hold for addresses that the other side never saw."""
        near, far = self.near, self.far
        assert self.a.child().mode == self.b.child().mode == "TRANSPORT"
        assert ping(near.host, far.wan4).lost == 0
        with tcp_server(far.gateway, far.wan4) as port:
            assert tcp_bulk(near.host, far.wan4, port, size=bulk).intact
        with udp_sink(far.gateway, far.wan4) as sink:
            sent = UdpStream(near.host, [(far.wan4, sink.port)], count=50, rate=rate).wait()
            assert sink.expect(sent.sent).received == 50
        # The open side knows the hidden one by its router's address.
        with udp_sink(near.host, near.host4) as sink:
            sent = UdpStream(far.gateway, [(near.wan4, sink.port)], count=50, rate=rate).wait()
            assert sink.expect(sent.sent).received == 50
        clear = [packet for packet in self.wire.packets() if packet.protocol in (1, 6) or (packet.protocol == 17 and not packet.is_ike and not packet.is_esp)]
        assert [str(packet) for packet in clear if not packet.is_keepalive] == []


@contextmanager
def behind_nat(make_a: DaemonFactory, make_b: DaemonFactory) -> Iterator[Hidden]:
    """The tunnel stands, begun by the hidden side."""
    with sites() as places:
        near, far = places.a, places.b
        near.gateway.run(["nft", f"{HIDE} add rule ip hide out oifname {WAN} masquerade"])
        a = make_a(near.host, _write(places.lab.directory / "a", local=str(near.host4), remote=str(far.wan4), name="a.example", peer="b.example"))
        b = make_b(far.gateway, _write(places.lab.directory / "b", local=str(far.wan4), remote="%any", name="b.example", peer="a.example"))
        with Capture(near.gateway, WAN) as wire:
            try:
                b.start()
                a.start()
                a.initiate()
                yield Hidden(near, far, a, b, wire)
            except BaseException as error:
                for daemon in (a, b):
                    with suppress(OSError, LabError):
                        error.add_note(f"--- {daemon.kind} at {daemon.namespace.role}\n{daemon.account()[-8000:]}")
                raise
            finally:
                for daemon in (a, b):
                    daemon.kill()
