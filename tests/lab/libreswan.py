"""Libreswan of a newer Debian in a namespace. It has no ESP of its own: it needs a kernel that has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import pkcs12

from lab.daemon import READY_SECONDS, ChildSa, ForeignDaemon, IkeSa, NegotiationFailed
from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, wait_until
from lab.root import NEWER
from lab.tunnel import CHILD, CONNECTION

PLUTO: Final = Path("/usr/libexec/ipsec/pluto")
WHACK: Final = Path("/usr/libexec/ipsec/whack")
CERTUTIL: Final = Path("/usr/bin/certutil")
PK12UTIL: Final = Path("/usr/bin/pk12util")

# Of `whack --showstates` and `whack --trafficstatus`; a connection for any peer has an instance for each: "site"[1] 192.0.2.1
_STATE: Final = re.compile(r'^#(\d+): "[^"]+"(?:\[\d+\] )?\S* (\w+) .*?(?:IKE SA #(\d+); )?idle', re.MULTILINE)
_SPIS: Final = re.compile(r'^#(\d+): "[^"]+"(?:\[\d+\] )?\S* esp\.([0-9a-f]+)@\S+ esp\.([0-9a-f]+)@', re.MULTILINE)
_TRAFFIC: Final = re.compile(r'^#(\d+): "[^"]+"(?:\[\d+\] )?\S*, type=ESP.* inBytes=(\d+), outBytes=(\d+)', re.MULTILINE)


def missing() -> str:
    """What this peer needs and is not there; empty when it is complete."""
    return ", ".join(str(path) for path in map(NEWER.file, (PLUTO, WHACK, CERTUTIL, PK12UTIL)) if not path.exists())


class Libreswan(ForeignDaemon):
    """pluto with the connection of the swanctl.conf at `config`, in its own words. Algorithms are its defaults; `options`: further lines of its connection."""

    kind = "libreswan"
    log_name = "pluto.log"

    def __init__(self, namespace: Namespace, config: Path, options: Mapping[str, str] | None = None) -> None:
        super().__init__(namespace, config)
        self.options = dict(options or {})

    def _write(self) -> None:
        text = self.config.read_text()

        def values(option: str) -> list[str]:
            return re.findall(rf"^\s*{option} = (.*)$", text, re.MULTILINE)

        (near_id, far_id), secrets = values("id")[:2], values("secret")
        connection = {
            "left": values("local_addrs")[0].replace("%any", "%defaultroute"),
            "right": values("remote_addrs")[0],
            "leftid": f"@{near_id}",
            "rightid": f"@{far_id}",
            "leftsubnet": values("local_ts")[0],
            "rightsubnet": values("remote_ts")[0],
            "encapsulation": values("encap")[0],
            "leftupdown": "%disabled",
            "keyexchange": "ikev2",
            "auto": "add",
            "authby": "secret",
        }
        if values("certs"):
            del connection["authby"]
            connection |= {"leftcert": "own", "leftsendcert": "always", "rightca": "%same"}
        self._file("ipsec.conf", f"conn {CONNECTION}\n" + "".join(f"  {name}={value}\n" for name, value in {**connection, **self.options}.items()))
        lines = ""
        if not values("certs"):
            lines += f"@{near_id} @{far_id} : PSK {secrets.pop(0)}\n"
        if secrets:  # the PPK comes last
            lines += f': PPKS "{values("id")[-1]}" {secrets[-1]}\n'
        self._file("ipsec.secrets", lines)

    def _file(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def _run(self, program: Path, *arguments: str) -> tuple[int, str]:
        done = self.namespace.run(NEWER.argv(self.namespace.directory, [str(program), *arguments]), check=False)
        return done.returncode, done.stdout + done.stderr

    def _tool(self, program: Path, *arguments: str) -> None:
        status, output = self._run(program, *arguments)
        if status:
            raise LabError(f"{program.name} {' '.join(arguments)}: status {status}\n{output}")

    def _database(self) -> None:
        folder, own = f"sql:{self.directory}", self.directory / "private" / "own.pem"
        self._tool(CERTUTIL, "-N", "-d", folder, "--empty-password")
        if own.exists():
            self._tool(CERTUTIL, "-A", "-d", folder, "-n", "ca", "-t", "CT,,", "-a", "-i", str(self.directory / "x509ca" / "ca.pem"))
            key = serialization.load_pem_private_key(own.read_bytes(), None)
            assert isinstance(key, RSAPrivateKey | EllipticCurvePrivateKey)
            certificate = x509.load_pem_x509_certificate((self.directory / "x509" / "own.pem").read_bytes())
            bundle = self.directory / "own.p12"
            bundle.write_bytes(pkcs12.serialize_key_and_certificates(b"own", key, certificate, None, serialization.BestAvailableEncryption(b"own")))
            self._tool(PK12UTIL, "-i", str(bundle), "-d", folder, "-W", "own")

    def start(self) -> None:
        if missing():
            raise LabError(f"{self.kind} is incomplete: {missing()} (make peers brings it)")
        self._write()
        self._database()
        here = str(self.directory)
        argv = [str(PLUTO), "--nofork", "--no-dnssec", "--config", f"{here}/ipsec.conf", "--secretsfile", f"{here}/ipsec.secrets"]
        argv += ["--nssdir", here, "--rundir", here, "--ipsecdir", here, "--logfile", str(self._log_path)]
        process = self.namespace.start(NEWER.argv(self.namespace.directory, argv), f"pluto-{self.directory.name}")
        self._process = process

        def ready() -> bool:
            if not process.running:
                raise LabError(f"pluto ended with status {process.status}\n{process.log()}\n{self.log()}")
            return "loading secrets" in self.log()  # after the connection and the interfaces

        wait_until(ready, "pluto is ready", READY_SECONDS, 0.05)

    def whack(self, *arguments: str) -> str:
        """What pluto answers; its connections may fail."""
        return self._run(WHACK, "--rundir", str(self.directory), *arguments)[1]

    def _order(self, *arguments: str) -> list[str]:
        status, output = self._run(WHACK, "--rundir", str(self.directory), *arguments, "--name", CONNECTION)
        if status:
            raise NegotiationFailed(f"{self.kind}: {arguments}: status {status}\n{output}")
        return output.splitlines()

    def initiate(self, child: str = CHILD, timeout: float = PATIENCE) -> list[str]:
        return self._order("--initiate")

    def terminate(self, *, child: str | None = None, ike: str | None = None, timeout: float = PATIENCE) -> list[str]:
        return self._order("--terminate")

    def rekey(self, *, child: str | None = None, ike: str | None = None) -> None:
        self._order("--rekey-child" if child else "--rekey-ike")

    def ike_sas(self) -> list[IkeSa]:
        """Established ones. It does not tell their SPIs, nor how many packets a CHILD_SA had."""
        shown = self.whack("--showstates")
        spis = {number: (int(out, 16), int(own, 16)) for number, out, own in _SPIS.findall(shown)}
        traffic = {number: (int(taken), int(sent)) for number, taken, sent in _TRAFFIC.findall(self.whack("--trafficstatus"))}
        states = [(number, state, parent) for number, state, parent in _STATE.findall(shown) if state.startswith("ESTABLISHED_")]

        def child(number: str) -> ChildSa:
            (out, own), (taken, sent) = spis.get(number, (0, 0)), traffic.get(number, (0, 0))
            return ChildSa(CHILD, "INSTALLED", "", False, own, out, taken, 0, sent, 0, (), (), "")

        def ike(number: str) -> IkeSa:
            children = tuple(child(one) for one, state, parent in states if state == "ESTABLISHED_CHILD_SA" and parent == number)
            return IkeSa(CONNECTION, "ESTABLISHED", int(number), False, "", "", "", children)

        return [ike(number) for number, state, _ in states if state == "ESTABLISHED_IKE_SA"]
