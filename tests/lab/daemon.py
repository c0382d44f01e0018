"""An IKE daemon of the lab, whichever it is: driven and watched over VICI."""

from __future__ import annotations

import abc
import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import vici  # type: ignore[import-untyped]
import vici.exception  # type: ignore[import-untyped]

from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, Process, wait_until
from lab.tunnel import CHILD, CONNECTION

READY_SECONDS: Final = PATIENCE
VICI_SECONDS: Final = 2 * PATIENCE  # longer than what is asked for


class NegotiationFailed(Exception):
    """The daemon could not bring the SA up, or down; the text is its own, with its progress lines."""


@dataclass(frozen=True, slots=True)
class ChildSa:
    """A CHILD_SA as list-sas tells it."""

    name: str
    state: str
    mode: str
    encap: bool
    spi_in: int
    spi_out: int
    bytes_in: int
    packets_in: int
    bytes_out: int
    packets_out: int
    local_ts: tuple[str, ...]
    remote_ts: tuple[str, ...]
    algorithm: str
    key_exchanges: tuple[str, ...] = ()  # the first and the additional ones (RFC 9370); none: without PFS


@dataclass(frozen=True, slots=True)
class IkeSa:
    """An IKE SA as list-sas tells it."""

    name: str
    state: str
    unique_id: int
    initiator: bool
    initiator_spi: str
    responder_spi: str
    remote_host: str
    children: tuple[ChildSa, ...]
    key_exchanges: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()  # exchanges that are under way or wait their turn, its own and its peer's


def _key_exchanges(raw: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(raw[key] for key in ("dh-group", *(f"ake{number}" for number in range(1, 8))) if key in raw)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_text(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return _text(value)


def _child(raw: Mapping[str, Any]) -> ChildSa:
    return ChildSa(
        name=raw["name"],
        state=raw["state"],
        mode=raw.get("mode", ""),
        encap=raw.get("encap") == "yes",
        spi_in=int(raw.get("spi-in", "0"), 16),
        spi_out=int(raw.get("spi-out", "0"), 16),
        bytes_in=int(raw.get("bytes-in", 0)),
        packets_in=int(raw.get("packets-in", 0)),
        bytes_out=int(raw.get("bytes-out", 0)),
        packets_out=int(raw.get("packets-out", 0)),
        local_ts=tuple(raw.get("local-ts", ())),
        remote_ts=tuple(raw.get("remote-ts", ())),
        algorithm=raw.get("encr-alg", ""),
        key_exchanges=_key_exchanges(raw),
    )


def _ike(name: str, raw: Mapping[str, Any]) -> IkeSa:
    return IkeSa(
        name=name,
        state=raw["state"],
        unique_id=int(raw["uniqueid"]),
        initiator=raw.get("initiator") == "yes",
        initiator_spi=raw.get("initiator-spi", ""),
        responder_spi=raw.get("responder-spi", ""),
        remote_host=raw.get("remote-host", ""),
        children=tuple(_child(child) for child in raw.get("child-sas", {}).values()),
        key_exchanges=_key_exchanges(raw),
        tasks=tuple(task for kind in ("active", "queued", "passive") for task in raw.get(f"tasks-{kind}", ())),
    )


class Daemon(abc.ABC):
    """A gateway's daemon in its namespace. `start` loads the configuration at `config` (a swanctl.conf) and returns when it serves."""

    kind: str

    def __init__(self, namespace: Namespace, config: Path) -> None:
        self.namespace = namespace
        self.config = config
        self.directory = config.parent
        self.vici_path = self.directory / "vici.sock"

    @abc.abstractmethod
    def start(self) -> None: ...

    @abc.abstractmethod
    def stop(self) -> None:
        """Orderly, then by force; no error when it is not running."""

    @abc.abstractmethod
    def kill(self) -> None:
        """SIGKILL of every process of this gateway."""

    @abc.abstractmethod
    def log(self) -> str: ...

    def account(self) -> str:
        """What explains a failure: the log, and counters where there are some."""
        return self.log()

    @contextlib.contextmanager
    def session(self) -> Iterator[vici.Session]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(VICI_SECONDS)
            sock.connect(str(self.vici_path))
            yield vici.Session(sock)

    def _answers(self) -> bool:
        try:
            with self.session() as session:
                session.version()
        except (OSError, vici.exception.SessionException):
            return False
        return True

    def request(self, command: str, **arguments: Any) -> list[dict[str, Any]]:
        """A VICI command; streamed replies are gathered. NegotiationFailed with the log lines when it is refused."""
        lines: list[Any] = []
        with self.session() as session:
            try:
                answer = getattr(session, command.replace("-", "_"))(arguments)
                if isinstance(answer, Mapping) or answer is None:
                    return [_plain(answer or {})]
                for part in answer:
                    lines.append(_plain(part))
            except vici.exception.CommandException as error:
                told = "\n".join(str(line.get("msg", line)) for line in lines)
                raise NegotiationFailed(f"{self.kind}: {command} {arguments}: {error}\n{told}") from None
        return lines

    def initiate(self, child: str = CHILD, timeout: float = PATIENCE) -> list[str]:
        """Bring a CHILD_SA up; the daemon's progress lines."""
        return [line.get("msg", "") for line in self.request("initiate", child=child, timeout=int(timeout * 1000))]

    def terminate(self, *, child: str | None = None, ike: str | None = None, timeout: float = PATIENCE) -> list[str]:
        what = {"child": child} if child else {"ike": ike or CONNECTION}
        return [line.get("msg", "") for line in self.request("terminate", timeout=int(timeout * 1000), **what)]

    def rekey(self, *, child: str | None = None, ike: str | None = None) -> None:
        """Begin to rekey; it is done when the list of SAs says so."""
        self.request("rekey", **({"child": child} if child else {"ike": ike or CONNECTION}))

    def ike_sas(self) -> list[IkeSa]:
        return [_ike(name, raw) for entry in self.request("list-sas") for name, raw in entry.items()]

    def children(self, name: str = CHILD) -> list[ChildSa]:
        return [child for ike in self.ike_sas() for child in ike.children if child.name == name]

    def child(self, name: str = CHILD) -> ChildSa:
        """The only installed CHILD_SA of that name. LabError when there is none or more."""
        installed = [child for child in self.children(name) if child.state == "INSTALLED"]
        if len(installed) != 1:
            raise LabError(f"{self.kind}: {len(installed)} installed CHILD_SAs {name}: {self.ike_sas()}\n{self.log()[-6000:]}")
        return installed[0]

    def wait_child(self, name: str = CHILD, timeout: float = PATIENCE) -> ChildSa:
        """The installed CHILD_SA, once there is one."""
        try:
            return wait_until(lambda: next((child for child in self.children(name) if child.state == "INSTALLED"), None), f"CHILD_SA {name}", timeout, 0.02)
        except LabError as error:
            raise LabError(f"{self.kind}: {error}\n{self.log()[-6000:]}") from None

    def wait_gone(self, *, timeout: float = PATIENCE) -> None:
        """Until no IKE SA is left."""
        try:
            wait_until(lambda: not self.ike_sas(), "no IKE SA left", timeout, 0.02)
        except LabError as error:
            raise LabError(f"{self.kind}: {error}: {self.ike_sas()}\n{self.log()[-6000:]}") from None

    def wait_child_gone(self, name: str = CHILD, timeout: float = PATIENCE) -> None:
        try:
            wait_until(lambda: not self.children(name), f"no CHILD_SA {name} left", timeout, 0.02)
        except LabError as error:
            raise LabError(f"{self.kind}: {error}: {self.ike_sas()}\n{self.log()[-6000:]}") from None

    def policies(self) -> list[dict[str, Any]]:
        """Installed traps and shunts, as list-policies tells them."""
        return [{"name": name, **raw} for entry in self.request("list-policies", trap="yes", drop="yes", **{"pass": "yes"}) for name, raw in entry.items()]


class ForeignDaemon(Daemon):
    """Another implementation's: one process, `start` keeps it, with a log file of its own in the directory."""

    log_name: ClassVar[str]

    def __init__(self, namespace: Namespace, config: Path) -> None:
        super().__init__(namespace, config)
        self._log_path = self.directory / self.log_name
        self._process: Process | None = None

    def signal(self, number: int) -> None:
        """SIGSTOP is a peer that is out of reach for a while."""
        if self._process is not None:
            os.kill(self._process.pid, number)

    def stop(self) -> None:
        if self._process is not None and self._process.running:
            self._process.stop()

    def kill(self) -> None:
        if self._process is not None and self._process.running:
            self._process.kill()

    def log(self) -> str:
        with contextlib.suppress(OSError):
            return self._log_path.read_text(errors="replace")
        return ""
