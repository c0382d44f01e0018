"""Transport mode between a host behind a NAT and one in the open (RFC 3948 section 3.1.2): both know the first by different addresses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab.capture import Capture
from lab.daemon import Daemon
from lab.pairing import OURS
from lab.topology import WAN, Site, sites
from lab.traffic import UdpStream, ping, tcp_bulk, tcp_server, udp_sink

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]

HIDE = "add table ip hide; add chain ip hide out { type nat hook postrouting priority 100; };"
CONFIG = """connections {{
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


def write(directory: Path, **words: str) -> Path:
    directory.mkdir(parents=True)
    path = directory / "swanctl.conf"
    path.write_text(CONFIG.format(**words))
    return path


@contextmanager
def behind_nat() -> Iterator[tuple[Site, Site, Daemon, Daemon, Capture]]:
    """Host A with a gateway of ours on it, its router that hides it, and another on gateway B."""
    with sites() as places:
        near, far = places.a, places.b
        near.gateway.run(["nft", f"{HIDE} add rule ip hide out oifname {WAN} masquerade"])
        a = OURS(near.host, write(places.lab.directory / "a", local=str(near.host4), remote=str(far.wan4), name="a.example", peer="b.example"))
        b = OURS(far.gateway, write(places.lab.directory / "b", local=str(far.wan4), remote="%any", name="b.example", peer="a.example"))
        with Capture(near.gateway, WAN) as wire:
            try:
                b.start()
                a.start()
                a.initiate()
                yield near, far, a, b, wire
            finally:
                a.stop()
                b.stop()


def test_tcp_and_udp_pass_both_ways() -> None:
    with behind_nat() as (near, far, a, b, wire):
        assert a.child().mode == b.child().mode == "TRANSPORT"
        assert ping(near.host, far.wan4).lost == 0
        with tcp_server(far.gateway, far.wan4) as port:
            assert tcp_bulk(near.host, far.wan4, port, size=4 << 20).intact
        with udp_sink(far.gateway, far.wan4) as sink:
            sent = UdpStream(near.host, [(far.wan4, sink.port)], count=50, rate=500).wait()
            assert sink.expect(sent.sent).received == 50
        # The open side knows the hidden one by its router's address.
        with udp_sink(near.host, near.host4) as sink:
            sent = UdpStream(far.gateway, [(near.wan4, sink.port)], count=50, rate=500).wait()
            assert sink.expect(sent.sent).received == 50
        clear = [packet for packet in wire.packets() if packet.protocol in (1, 6) or (packet.protocol == 17 and not packet.is_ike and not packet.is_esp)]
        assert [packet for packet in clear if not packet.is_keepalive] == []
