"""Debian's OpenIKED in a namespace. Its ESP is the kernel's, by AF_KEY; where there is none, a kernel-shim may stand in for it.

It keeps keys and certificates in /etc/iked, which is a folder of its own here: the mount namespace has been made already.
It has no command to begin or to rekey; a policy that is active begins, and lifetimes rekey.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.hazmat.primitives import serialization

from lab import af_key_stand_in
from lab.certs import KeyKind, make_key
from lab.daemon import READY_SECONDS, ChildSa, ForeignDaemon, IkeSa
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, wait_until
from lab.tunnel import CHILD, CONNECTION

IKED: Final = Path("/usr/sbin/iked")
IKECTL: Final = Path("/usr/sbin/ikectl")
SETTINGS: Final = Path("/etc/iked")
FOLDERS: Final = ("ca", "certs", "crls", "private", "pubkeys")

_OWN: Final = f'mount -t tmpfs tmpfs /run && mount --bind "$1" {SETTINGS} && exec >>"$2" 2>&1 && shift 2 && exec "$@"'  # settings, log, program

# Of `ikectl show sa`: spi of both ends, address of the peer, state, role; each SA of a CHILD_SA names the other one of its pair
_IKE: Final = re.compile(r"^iked_sas: \S+ rspi 0x(\w+) ispi 0x(\w+) \S+->(\S+):\d+<.*>\[.*\] (\S+) ([ir])( natt)?( udpecap)? nexti")
_HALF: Final = re.compile(r"^  sa_childsas: (\S+) ESP 0x(\w+) (in|out) .* \((\w*)\) B=\S+ P=(\S+) @")


class Half(NamedTuple):
    """One SA of a CHILD_SA."""

    direction: str  # in, out
    spi: int
    loaded: bool  # it is in the kernel


def missing() -> str:
    """What this peer needs and is not there; empty when it is complete."""
    return ", ".join(str(path) for path in (IKED, IKECTL) if not path.exists())


class OpenIked(ForeignDaemon):
    """iked with the connection of the swanctl.conf at `config`, in its own words. Algorithms are its defaults.

    `policy`: further words of its policy, in its grammar's order (ikesa, childsa), which begins behind the addresses; `lifetimes` those behind the names.
    `settings`: its `set` lines.
    """

    kind = "OpenIKED"
    log_name = "iked.log"

    def __init__(self, namespace: Namespace, config: Path, *, policy: str = "", lifetimes: str = "", settings: Sequence[str] = ()) -> None:
        super().__init__(namespace, config)
        self.policy = policy
        self.lifetimes = lifetimes
        self.settings = settings
        self._folder = self.directory / "iked"
        self._control = self.directory / "iked.sock"

    def _lines(self, mode: str) -> str:
        text = self.config.read_text()

        def values(option: str) -> list[str]:
            return re.findall(rf"^\s*{option} = (.*)$", text, re.MULTILINE)

        def value(option: str) -> str:
            return values(option)[0]

        near_id, far_id = values("id")[:2]
        near, far = value("local_addrs"), value("remote_addrs")
        selectors = (near, far) if value("mode") == "transport" else (value("local_ts"), value("remote_ts"))
        words = f'ikev2 "{CONNECTION}" {mode} {value("mode")} esp from {selectors[0]} to {selectors[1]} local {near} peer {far}'
        words += f" {self.policy} srcid {near_id} dstid {far_id} {self.lifetimes}"
        words += "" if values("certs") else f" psk {value('secret')}"
        return "".join(f"set {setting}\n" for setting in self.settings) + words + "\n"

    def _write(self) -> None:
        for name in FOLDERS:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o755)
        near_id = re.findall(r"^\s*id = (.*)$", self.config.read_text(), re.MULTILINE)[0]
        own = self.directory / "private" / "own.pem"
        key = serialization.load_pem_private_key(own.read_bytes(), None) if own.exists() else make_key(KeyKind.ECDSA)  # without one it does not start
        form = serialization.PrivateFormat.TraditionalOpenSSL
        self._file("private/local.key", key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), 0o600)
        self._file("local.pub", key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
        if own.exists():
            self._file("ca/ca.crt", (self.directory / "x509ca" / "ca.pem").read_bytes())
            self._file(f"certs/{near_id}.crt", (self.directory / "x509" / "own.pem").read_bytes())
        for mode in ("active", "passive"):
            path = self.directory / f"{mode}.conf"
            path.write_text(self._lines(mode))
            path.chmod(0o600)

    def _file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        path = self._folder / name
        path.write_bytes(data)
        path.chmod(mode)

    def _kernel(self) -> list[str]:
        """What iked is run by so that it has AF_KEY."""
        return []

    def start(self) -> None:
        if missing():
            raise LabError(f"{self.kind} is incomplete: {missing()} (make peers installs it)")
        self._write()
        argv = ["sh", "-c", _OWN, "sh", str(self._folder), str(self._log_path), *self._kernel()]
        argv += [str(IKED), "-d", "-vv", "-f", str(self.directory / "passive.conf"), "-s", str(self._control)]
        said = len(self.log())
        process = self.namespace.start(argv, f"iked-{self.directory.name}")
        self._process = process

        def ready() -> bool:
            if not process.running:
                raise LabError(f"iked ended with status {process.status}\n{process.log()}\n{self.log()}")
            return "config_getstatic: nattport" in self.log()[said:]  # after the policies and the sockets

        wait_until(ready, "iked is ready", READY_SECONDS, 0.02)

    def ikectl(self, *arguments: str) -> str:
        """What ikectl says; LabError when it fails."""
        return self.namespace.run([str(IKECTL), "-s", str(self._control), *arguments]).stdout

    def begin(self) -> None:
        """Its policy becomes and stays active; two seconds later it begins, and when that fails once a minute."""
        self.ikectl("load", str(self.directory / "active.conf"))

    def initiate(self, child: str = CHILD, timeout: float = PATIENCE) -> list[str]:
        self.begin()
        self.wait_child(child, timeout)
        return []

    def terminate(self, *, child: str | None = None, ike: str | None = None, timeout: float = PATIENCE) -> list[str]:
        """All IKE SAs; returns before the peer has answered."""
        return self.ikectl("reset", "sa").splitlines()

    def rekey(self, *, child: str | None = None, ike: str | None = None) -> None:
        raise LabError("OpenIKED has no command to rekey")

    def ike_sas(self) -> list[IkeSa]:
        """Those that are established. It does not count traffic."""
        found: list[IkeSa] = []
        halves: dict[str, Half] = {}
        established = False
        for line in self.ikectl("show", "sa").splitlines():
            if match := _IKE.match(line):
                responder, initiator, host, state, role, _, encap = match.groups()
                halves, established = {}, state == "ESTABLISHED"
                if established:
                    found.append(IkeSa(CONNECTION, state, int(initiator, 16), role == "i", initiator, responder, host, ()))
            elif established and (match := _HALF.match(line)):
                name, spi, direction, flags, other = match.groups()
                halves[name] = Half(direction, int(spi, 16), "L" in flags)
                if other in halves:
                    inbound, outbound = sorted((halves[name], halves[other]))
                    found[-1] = replace(found[-1], children=(*found[-1].children, self._child(inbound, outbound, bool(encap))))
        return found

    def _child(self, inbound: Half, outbound: Half, encap: bool) -> ChildSa:
        state = "INSTALLED" if inbound.loaded and outbound.loaded else "CREATED"
        return ChildSa(CHILD, state, "TUNNEL", encap, inbound.spi, outbound.spi, 0, 0, 0, 0, (), (), "")

    def signal(self, number: int) -> None:
        """To all its processes."""
        for pid in self.namespace.pids():
            with contextlib.suppress(OSError):
                if Path("/proc", str(pid), "comm").read_text().strip() == IKED.name:
                    os.kill(pid, number)

    def log(self) -> str:
        """Without a line for each time that it was asked for its SAs."""
        return super().log().replace("ikev2_info: called\n", "")


class OpenIkedOnShim(OpenIked):
    """On a machine without AF_KEY: a kernel-shim of its own is its kernel.

    That takes ESP out of UDP only at sockets that the key manager has from it, and iked has its own.
    """

    kind = "OpenIKED on kernel-shim"

    def __init__(self, namespace: Namespace, config: Path, *, policy: str = "", lifetimes: str = "", settings: Sequence[str] = ()) -> None:
        super().__init__(namespace, config, policy=policy, lifetimes=lifetimes, settings=settings)
        self._host = Gateway(namespace, config)

    def _kernel(self) -> list[str]:
        self._host.start_shim()
        return [sys.executable, af_key_stand_in.__file__, str(self._host.shim_path)]

    def _child(self, inbound: Half, outbound: Half, encap: bool) -> ChildSa:
        child = super()._child(inbound, outbound, encap)
        counted = {int(sa["spi"], 16): sa for sa in self._host.sad()}
        if child.spi_in not in counted or child.spi_out not in counted:
            return child
        taken, sent = counted[child.spi_in], counted[child.spi_out]
        return replace(child, bytes_in=taken["octets"], packets_in=taken["packets"], bytes_out=sent["octets"], packets_out=sent["packets"])

    def stop(self) -> None:
        super().stop()
        self._host.stop()

    def kill(self) -> None:
        super().kill()
        self._host.kill_shim()

    def account(self) -> str:
        return f"{self.log()}\n--- its kernel\n{self._host.account()}"
