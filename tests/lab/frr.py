"""Debian's FRR in a namespace: zebra, which says its routes to whoever listens for them (FPM), and other daemons of the suite.

On a kernel without MPLS zebra would keep labels to itself. A tree that claims it, in a mount namespace of the suite's own, lies over /proc/sys/net
then: zebra's own attempts at the kernel fail, what it says over FPM does not. Its files live in a tmpfs on /run, which `ip netns exec` made private.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, Process, wait_until

DAEMONS: Final = Path("/usr/lib/frr")
READY_SECONDS: Final = PATIENCE
KEEP_SECONDS: Final = 60  # that a zebra which starts leaves alone what an earlier one put into the kernel
START_ORDER: Final = ("zebra", "staticd", "bgpd")

_PREPARE: Final = """
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/frr /run/net /var/tmp/frr
chown frr:frr /run/frr
if ! [ -e /proc/sys/net/mpls ]; then
    for part in ipv4 ipv6 core; do
        mkdir /run/net/$part
        mount --rbind /proc/sys/net/$part /run/net/$part
    done
    for link in $(ls /sys/class/net); do
        mkdir -p /run/net/mpls/conf/$link
        echo 1 >/run/net/mpls/conf/$link/input
    done
    echo 1048575 >/run/net/mpls/platform_labels
    echo 1 >/run/net/mpls/ip_ttl_propagate
    mount --rbind /run/net /proc/sys/net
fi
exec sleep infinity
"""


def missing() -> str:
    """What this peer needs and the machine has not; empty when it is complete."""
    return ", ".join(str(path) for path in (DAEMONS / "zebra",) if not path.exists())


class Frr:
    """`configurations`: for each daemon that is to run, its configuration."""

    def __init__(self, namespace: Namespace, directory: Path, configurations: Mapping[str, str]) -> None:
        self.namespace = namespace
        self.directory = directory
        self.configurations = dict(configurations)
        self._holder: Process | None = None  # of the mount namespace
        self._daemons: dict[str, Process] = {}

    def start(self) -> None:
        if missing():
            raise LabError(f"FRR is incomplete: {missing()} (make peers installs it)")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._holder = self.namespace.start(["unshare", "-m", "sh", "-ec", _PREPARE], f"frr-{self.directory.name}")
        holder = self._holder

        def prepared() -> bool:
            if not holder.running:
                raise LabError(f"FRR's mounts\n{holder.log()}")
            return Path(f"/proc/{holder.pid}/comm").read_text().strip() == "sleep"

        wait_until(prepared, "FRR's mount namespace", READY_SECONDS, 0.02)
        self.revive()

    def start_daemon(self, daemon: str) -> None:
        """Returns when it can be asked."""
        path = self.directory / f"{daemon}.conf"
        path.write_text("log stdout informational\n" + self.configurations[daemon])
        copy = f"cp {path} /run/frr/{daemon}.conf && chown frr:frr /run/frr/{daemon}.conf"
        options = ["-f", f"/run/frr/{daemon}.conf", "-i", f"/run/frr/{daemon}.pid", "-z", "/run/frr/zserv.api", "--vty_socket", "/run/frr", "-A", "127.0.0.1"]
        if daemon == "zebra":
            options += ["-M", "dplane_fpm_nl", "-K", str(KEEP_SECONDS)]
        argv = self._inside(["sh", "-c", f'{copy} && exec "$0" "$@"', str(DAEMONS / daemon), *options])
        process = self.namespace.start(argv, f"{daemon}-{self.directory.name}")
        self._daemons[daemon] = process

        def ready() -> bool:
            if not process.running:
                raise LabError(f"{daemon} ended with status {process.status}\n{process.log()}")
            with suppress(OSError), self._connected(daemon):
                return True
            return False

        wait_until(ready, daemon, READY_SECONDS, 0.05)

    def kill_daemon(self, daemon: str) -> None:
        """SIGKILL: routes that it told others of are not taken back."""
        self._daemons.pop(daemon).kill()

    def crash(self) -> None:
        """All of them, zebra first: nobody takes anything back."""
        for daemon in list(self._daemons):
            self.kill_daemon(daemon)

    def revive(self) -> None:
        for daemon in START_ORDER:
            if daemon in self.configurations:
                self.start_daemon(daemon)

    def tell(self, *lines: str, daemon: str = "zebra") -> str:
        """Lines of configuration; LabError when one is refused."""
        return self.ask("configure terminal", *lines, daemon=daemon)

    def ask(self, *commands: str, daemon: str = "zebra") -> str:
        """As vtysh does (FRR: vtysh/vtysh.c, vtysh_client_run): a command ends in NUL, its answer in three and a status."""
        told = ""
        with self._connected(daemon) as sock:
            for command in ("enable", *commands):
                sock.sendall(command.encode() + b"\0")
                answer = b""
                while answer[-4:-1] != b"\0\0\0":
                    piece = sock.recv(65536)
                    if not piece:
                        raise LabError(f"{daemon} ended at '{command}'")
                    answer += piece
                told += answer[:-4].decode()
                if answer[-1]:
                    raise LabError(f"{daemon}: '{command}' has status {answer[-1]}\n{told}")
        return told

    def show(self, command: str, daemon: str = "zebra") -> Any:
        return json.loads(self.ask(f"{command} json", daemon=daemon))

    def log(self) -> str:
        return "\n".join(f"{daemon}:\n{process.log()[-6000:]}" for daemon, process in self._daemons.items())

    def kill(self) -> None:
        self.crash()
        if self._holder is not None:
            self._holder.kill()
            self._holder = None

    def _connected(self, daemon: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(READY_SECONDS)
        try:
            sock.connect(str(self._within(f"/run/frr/{daemon}.vty")))
        except BaseException:
            sock.close()
            raise
        return sock

    def _within(self, path: str) -> Path:
        """A path of the daemons' mount namespace, from here."""
        assert self._holder is not None
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def _inside(self, argv: list[str]) -> list[str]:
        assert self._holder is not None
        return ["nsenter", "-t", str(self._holder.pid), "-m", *argv]
