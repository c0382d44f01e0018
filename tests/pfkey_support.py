"""A naive kernel, IKE sockets that are none, and a SOCK_SEQPACKET edge, for tests of the PF_KEY sessions and the channel."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.dataplane.engine import Engine
from kernel_shim.kernel import Kernel
from kernel_shim.model import (
    AcquireSequence,
    AddressRange,
    Capabilities,
    Direction,
    IPAddress,
    KernelError,
    KernelEvent,
    Migration,
    Mode,
    Policy,
    PolicyIndex,
    ReqId,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
    TrafficSelector,
    Unresolved,
)
from kernel_shim.pfkey.server import ClientId, ServerSession
from kernel_shim.policy.migration import moved
from kernel_shim.secret import NO_SECRET, Secret

GCM = EspAlgorithm(EncryptionId.AES_GCM_16, 128)
CHACHA = EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256)
CBC = EspAlgorithm(EncryptionId.AES_CBC, 256, IntegrityId.HMAC_SHA2_256_128)
CBC_SHA1 = EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA1_96)
A, B = ip_address("192.0.2.1"), ip_address("192.0.2.2")
EPOCH = 1_700_000_000.0


def make_sa(spi: int = 0x1000, **changes: object) -> SecurityAssociation:
    algorithm = changes.get("algorithm", GCM)
    assert isinstance(algorithm, EspAlgorithm)
    sa = SecurityAssociation(
        spi=Spi(spi),
        source=A,
        destination=B,
        direction=Direction.OUT,
        mode=Mode.TUNNEL,
        reqid=ReqId(7),
        algorithm=algorithm,
        encryption_key=Secret(bytes(range(algorithm.encryption_key_length))),
        integrity_key=Secret(bytes(range(algorithm.integrity_key_length))),
        replay_window=0,
    )
    return replace(sa, **changes)  # type: ignore[arg-type]


def without_keys(sa: SecurityAssociation) -> SecurityAssociation:
    return replace(sa, encryption_key=NO_SECRET, integrity_key=NO_SECRET)


def everything(address: str) -> AddressRange:
    from ipaddress import ip_network

    return AddressRange.of(ip_network(address))


def selectors(*addresses: str) -> tuple[TrafficSelector, ...]:
    return tuple(TrafficSelector(everything(address)) for address in addresses)


class NaiveKernel:
    """Dicts and lists. Time is whatever the caller says."""

    def __init__(self) -> None:
        self.table: dict[SaId, SaStatus] = {}
        self.spd: list[Policy] = []
        self.listeners: list[Callable[[KernelEvent], None]] = []
        self.listening: list[bool] = []
        self.failed: list[tuple[int, int]] = []
        self.outstanding: list[KernelEvent] = []  # told again whenever a key manager comes
        self.next_spi = 0x100
        self.calls: list[str] = []

    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="naive",
            algorithms=frozenset({GCM, CHACHA, CBC, CBC_SHA1}),
            encapsulation_required=True,
            unresolved_modes=frozenset(Unresolved),
            binds_ike_sockets=True,
        )

    def emit(self, event: KernelEvent) -> None:
        for listener in self.listeners:
            listener(event)

    def get_spi(self, request: SpiRequest, now: float) -> SaStatus:
        self.calls.append("get_spi")
        self.next_spi += 1
        spi = max(self.next_spi, request.minimum)
        if spi > request.maximum:
            raise KernelError(errno.ENOENT, "no SPI is free")
        sa = SecurityAssociation(Spi(spi), request.source, request.destination, Direction.IN, request.mode, request.reqid, GCM, acquire=request.acquire)
        status = self.table[sa.id] = SaStatus(sa, SaState.LARVAL, added=EPOCH + now)
        return status

    def add_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        self.calls.append("add_sa")
        if sa.id in self.table and self.table[sa.id].state is not SaState.LARVAL:
            raise KernelError(errno.EEXIST, f"SPI {sa.spi:#x} is taken")
        status = self.table[sa.id] = SaStatus(sa, SaState.MATURE, added=EPOCH + now)
        return status

    def update_sa(self, sa: SecurityAssociation, now: float) -> SaStatus:
        self.calls.append("update_sa")
        if sa.id not in self.table:
            raise KernelError(errno.ESRCH, f"no SA {sa.spi:#x}")
        status = self.table[sa.id] = SaStatus(sa, SaState.MATURE, added=EPOCH + now)
        return status

    def delete_sa(self, sa: SaId) -> SaStatus:
        self.calls.append("delete_sa")
        if sa not in self.table:
            raise KernelError(errno.ESRCH, f"no SA {sa.spi:#x}")
        return self.table.pop(sa)

    def get_sa(self, sa: SaId) -> SaStatus:
        if sa not in self.table:
            raise KernelError(errno.ESRCH, f"no SA {sa.spi:#x}")
        return self.table[sa]

    def sas(self) -> Sequence[SaStatus]:
        return list(self.table.values())

    def flush_sas(self) -> int:
        count = len(self.table)
        self.table.clear()
        return count

    def _find(self, direction: Direction, selector: Selector) -> Policy | None:
        return next((policy for policy in self.spd if (policy.direction, policy.selector) == (direction, selector)), None)

    def add_policy(self, policy: Policy, now: float) -> Policy:
        if self._find(policy.direction, policy.selector) is not None:
            raise KernelError(errno.EEXIST, "policy exists")
        added = replace(policy, index=PolicyIndex(8 * (len(self.spd) + 1) + policy.direction - 1))
        self.spd.append(added)
        return added

    def update_policy(self, policy: Policy, now: float) -> Policy:
        old = self._find(policy.direction, policy.selector)
        if old is None:
            return self.add_policy(policy, now)
        self.spd[self.spd.index(old)] = updated = replace(policy, index=old.index)
        return updated

    def delete_policy(self, direction: Direction, selector: Selector) -> Policy:
        policy = self._find(direction, selector)
        if policy is None:
            raise KernelError(errno.ENOENT, "no such policy")
        self.spd.remove(policy)
        return policy

    def delete_policy_index(self, direction: Direction, index: PolicyIndex) -> Policy:
        policy = self.get_policy(direction, index)
        self.spd.remove(policy)
        return policy

    def get_policy(self, direction: Direction, index: PolicyIndex) -> Policy:
        for policy in self.spd:
            if (policy.direction, policy.index) == (direction, index):
                return policy
        raise KernelError(errno.ENOENT, "no such policy")

    def migrate(self, migration: Migration, now: float) -> Policy:
        policy = self._find(migration.direction, migration.selector)
        if policy is None:
            raise KernelError(errno.ENOENT, "no such policy")
        templates = moved(policy.templates, migration.moves)
        if templates is None:
            raise KernelError(errno.ENODATA, "no such template")
        return self.update_policy(replace(policy, templates=templates), now)

    def policies(self) -> Sequence[Policy]:
        return list(self.spd)

    def flush_policies(self) -> int:
        count = len(self.spd)
        self.spd.clear()
        return count

    def acquire_failed(self, sequence: AcquireSequence, errno: int, now: float) -> None:
        self.failed.append((sequence, errno))

    def key_manager_listens(self, listening: bool, now: float) -> None:
        self.listening.append(listening)
        if listening:
            for event in self.outstanding:
                self.emit(event)

    def subscribe(self, listener: Callable[[KernelEvent], None]) -> None:
        self.listeners.append(listener)

    def statistics(self) -> Mapping[str, int]:
        return {"packets": 3, "drops.no_sa": 1 << 40}


class PipeSockets:
    """Gives the two ends of a pipe a bound address, so that a test can see that it got the right ones."""

    def __init__(self) -> None:
        self.bound: dict[IPAddress, tuple[int, int]] = {}

    def bind(self, address: IPAddress) -> tuple[int, int]:
        if address.is_multicast:
            raise KernelError(errno.EADDRNOTAVAIL, f"{address} is not ours")
        if address not in self.bound:
            self.bound[address] = os.pipe()
        return self.bound[address]

    def unbind(self, address: IPAddress) -> None:
        for descriptor in self.bound.pop(address, ()):
            os.close(descriptor)

    def close(self) -> None:
        for address in list(self.bound):
            self.unbind(address)


@dataclass
class Talk:
    """A conversation with a `ServerSession` without sockets: one client of it."""

    session: ServerSession
    client: ClientId
    now: float = 0.0

    @classmethod
    def start(cls, session: ServerSession, number: int = 1) -> Talk:
        session.accept(ClientId(number), pid=100 + number, uid=0, now=0.0)
        return cls(session, ClientId(number))

    def say(self, data: bytes) -> None:
        self.session.receive(self.client, data, self.now)

    def hear(self) -> bytes | None:
        output = self.session.next_output(self.client, self.now)
        if output is None:
            return None
        self.session.output_sent(self.client, self.now)
        return output.data

    def hear_all(self) -> list[bytes]:
        return list(iter(self.hear, None))

    def ask(self, data: bytes) -> bytes:
        self.say(data)
        heard = self.hear()
        assert heard is not None
        return heard


class SocketEdge:
    """Serves a `ServerSession` on a SOCK_SEQPACKET socket from the running event loop."""

    def __init__(self, path: Path, kernel: Kernel, *, send_buffer: int | None = None) -> None:
        self.sockets = PipeSockets()
        self.kernel = kernel
        engine = kernel if isinstance(kernel, Engine) else None
        self.session = ServerSession(kernel, self.sockets, inspected=engine, labels=engine)
        self.clients: dict[int, socket.socket] = {}
        self.paused = False
        self.before_send: Callable[[], None] | None = None
        self._send_buffer = send_buffer
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(os.fspath(path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.setblocking(False)
        if self._send_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        number = client.fileno()
        self.session.accept(ClientId(number), pid=0, uid=0, now=self._loop.time())
        self.clients[number] = client
        self._watch(number)

    def _watch(self, number: int) -> None:
        if self.session.wants_read(ClientId(number)) and not self.paused:
            self._loop.add_reader(number, self._read, number)
        else:
            self._loop.remove_reader(number)

    def pause(self, paused: bool) -> None:
        self.paused = paused
        for number in self.clients:
            self._watch(number)

    def _read(self, number: int) -> None:
        try:
            data = self.clients[number].recv(1 << 19)
        except OSError:
            data = b""
        if not data:
            self.drop(number)
            return
        self.session.receive(ClientId(number), data, self._loop.time())
        self.send_ready()

    def send_ready(self) -> None:
        for client in self.session.take_ready():
            self._send(client)

    def _send(self, number: int) -> None:
        self._loop.remove_writer(number)
        while (output := self.session.next_output(ClientId(number), self._loop.time())) is not None:
            if self.before_send is not None:
                self.before_send()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", output.descriptors))] if output.descriptors else []
            try:
                self.clients[number].sendmsg([output.data], rights)
            except BlockingIOError:
                self._loop.add_writer(number, self._send, number)
                break
            except OSError:
                self.drop(number)
                return
            self.session.output_sent(ClientId(number), self._loop.time())
        self._watch(number)

    def drop(self, number: int) -> None:
        self._loop.remove_reader(number)
        self._loop.remove_writer(number)
        self.session.disconnect(ClientId(number), self._loop.time())
        self.clients.pop(number).close()

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for number in list(self.clients):
            self.drop(number)
        self.sockets.close()
