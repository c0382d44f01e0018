"""Our gateway in a namespace: `kernel-shim serve` and `vpnd run`, with sockets and state in a directory of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lab.daemon import READY_SECONDS, Daemon
from lab.namespaces import Namespace
from lab.process import LabError, Process, wait_until

REPOSITORY: Final = Path(__file__).resolve().parents[2]
TUN: Final = "vpn0"


def _program(module: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())"]


VPND: Final = _program("vpnd.cli.daemon")
VPNCTL: Final = _program("vpnd.cli.control")
KERNEL_SHIM: Final = _program("kernel_shim.io.main")


class Gateway(Daemon):
    """`config` is a swanctl.conf; the daemon's own section goes into vpnd.conf beside it, which includes it.

    The shim is a process of its own, as with two systemd units; `shim_from_vpnd` lets vpnd start it.
    `load_swanctl_conf=False` leaves connections and secrets to a client of the control socket. `settings`: further options of the `vpnd` section.
    """

    kind = "vpnd"
    vpnd_program: Sequence[str] = VPND

    def __init__(
        self, namespace: Namespace, config: Path, *, shim_from_vpnd: bool = False, load_swanctl_conf: bool = True, settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(namespace, config)
        self.shim_from_vpnd = shim_from_vpnd
        self.load_swanctl_conf = load_swanctl_conf
        self.settings = dict(settings or {})
        self.shim_path = self.directory / "kernel.sock"
        self.main_config = self.directory / "vpnd.conf"
        self.vpnd: Process | None = None
        self.shim: Process | None = None

    def _write_main_config(self) -> None:
        own = "".join(f"  {name} = {value}\n" for name, value in self.settings.items())
        self.main_config.write_text(
            "vpnd {\n"
            "  kernel = userspace\n"
            f"  shim_socket = {self.shim_path}\n"
            f"  start_shim = {'yes' if self.shim_from_vpnd else 'no'}\n"
            f"  control_socket = {self.vici_path}\n"
            f"  state_dir = {self.directory / 'state'}\n"
            f"{own}}}\n" + (f"include {self.config}\n" if self.load_swanctl_conf else "")
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}

    def start(self) -> None:
        self._write_main_config()
        if not self.shim_from_vpnd:
            self.start_shim()
        self.start_vpnd()

    def start_shim(self) -> None:
        """Start `kernel-shim serve` and wait until it says that it listens."""
        read, write = os.pipe()
        try:
            self.shim = self.namespace.start(
                [*KERNEL_SHIM, "serve", "--socket", str(self.shim_path), "--tun", TUN, "--ready-fd", str(write)],
                f"shim-{self.directory.name}",
                env=self._environment(),
                pass_fds=[write],
            )
        finally:
            os.close(write)
        with os.fdopen(read, "rb") as ready:
            if not ready.readline():
                raise LabError(f"kernel-shim ended with status {self.shim.wait()}\n{self.shim.log()}")

    def start_vpnd(self) -> None:
        """Start `vpnd run` and wait until it notifies READY=1, as systemd does."""
        path = self.directory / "notify.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            notify.settimeout(0.1)
            self.vpnd = self.namespace.start(
                [*self.vpnd_program, "run", "--config", str(self.main_config)],
                f"vpnd-{self.directory.name}",
                env={**self._environment(), "NOTIFY_SOCKET": str(path)},
            )
            deadline = time.monotonic() + READY_SECONDS
            while True:
                try:
                    if b"READY=1" in notify.recv(4096):
                        return
                except TimeoutError:
                    if not self.vpnd.running:
                        raise LabError(f"vpnd ended with status {self.vpnd.status}\n{self.log()}") from None
                    if time.monotonic() > deadline:
                        raise LabError(f"vpnd was not ready in {READY_SECONDS:g} s\n{self.log()}") from None

    def shim_pids(self) -> list[int]:
        """The shim's processes, whoever started them."""
        own = self.shim.pid if self.shim is not None else 0  # when it was forked its command line is another's
        return [pid for pid in self.namespace.pids() if pid == own or "kernel_shim.io.main" in _command_line(pid)]

    def kill_shim(self) -> None:
        """Returns when it is gone; by then vpnd, where it starts the shim, may have started another."""
        killed = self._signal_shim(signal.SIGKILL)
        if self.shim is not None:
            self.shim.wait()
        wait_until(lambda: killed.isdisjoint(self.shim_pids()), "the shim is gone")

    def kill_vpnd(self) -> None:
        if self.vpnd is not None and self.vpnd.running:
            self.vpnd.kill()

    def kill(self) -> None:
        self.kill_vpnd()
        self.kill_shim()

    def stop(self) -> None:
        """vpnd first: it deletes its SAs at the peer; then the shim, which takes what it put into the host away."""
        if self.vpnd is not None and self.vpnd.running:
            status = self.vpnd.stop()
            if status:
                raise LabError(f"vpnd ended with status {status}\n{self.log()}")
        if self.shim is not None and self.shim.running:
            status = self.shim.stop()
            if status:
                raise LabError(f"kernel-shim ended with status {status}\n{self.log()}")
        self._signal_shim(signal.SIGTERM)
        wait_until(lambda: not self.shim_pids(), "the shim has ended")

    def _signal_shim(self, number: signal.Signals) -> set[int]:
        """The processes that were there."""
        pids = set(self.shim_pids())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # one that vpnd started ends with it
                os.kill(pid, number)
        return pids

    def vpnctl(self, *arguments: str, check: bool = True) -> str:
        """Run vpnctl against this daemon; its output."""
        done = self.namespace.run(
            [*VPNCTL, "--socket", str(self.vici_path), *arguments],
            check=check,
            env=self._environment(),
        )
        return done.stdout if check else done.stdout + done.stderr

    def counters(self) -> dict[str, int]:
        """The shim's counters, those that are not 0."""
        done = self.namespace.run([*KERNEL_SHIM, "stats", "--json", "--socket", str(self.shim_path)], env=self._environment())
        return {name: value for name, value in json.loads(done.stdout).items() if value}

    def sad(self) -> list[dict[str, Any]]:
        """The shim's security associations, as `kernel-shim sad --json` shows them."""
        done = self.namespace.run([*KERNEL_SHIM, "sad", "--json", "--socket", str(self.shim_path)], env=self._environment())
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def account(self) -> str:
        return f"{self.log()}\n--- counters\n{self.counters()}" if self.shim_pids() else self.log()

    def log(self) -> str:
        logs = [process.log() for process in (self.vpnd, self.shim) if process is not None]
        return "\n--- shim\n".join(logs)

    def traces(self) -> list[str]:
        """What stands in the host that a gateway may leave behind: routes, rules, nftables tables and links that are not the topology's."""
        found = []
        for family in ("-4", "-6"):
            rules = self.namespace.run(["ip", family, "rule"]).stdout.splitlines()
            found += [rule for rule in rules if rule.split()[-1] not in ("local", "main", "default")]
            routes = self.namespace.run(["ip", family, "route", "show", "table", "all"]).stdout.splitlines()
            found += [route for route in routes if TUN in route or "proto 178" in route]
        found += self.namespace.run(["nft", "list", "tables"]).stdout.splitlines()
        found += [name for name in self.namespace.interfaces() if name.startswith(TUN)]
        return found


def _command_line(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
