"""A daemon without IKE for the control server's tests, and the server on a real socket in a thread's event loop."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives import serialization

from kernel_shim.model import AddressRange, Endpoint, IPAddress, Mode, TrafficSelector
from kernel_shim.mpls.labels import Label
from vpnd.auth.credentials import CredentialStore, LoadedCertificate
from vpnd.config.credentials import load_private_key
from vpnd.config.model import ConnectionConfig, DaemonConfig, PrivateKeySource, SharedSecret
from vpnd.control.backend import (
    ChildRekeyed,
    ChildState,
    ChildStatus,
    ChildUpDown,
    ControlError,
    DaemonEvent,
    DaemonStats,
    IkeRekeyed,
    IkeState,
    IkeStatus,
    IkeUpDown,
    LogLine,
    PolicyStatus,
)
from vpnd.control.server import ControlServer
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.iana import ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import parse_proposals
from vpnd.mpls.trace import Step
from vpnd.telemetry.exchanges import ExchangeCounters

T = TypeVar("T")


def selector(text: str) -> TrafficSelector:
    return TrafficSelector(AddressRange.of(ip_network(text)))


def child_status(name: str = "net", unique_id: int = 7, **changes: Any) -> ChildStatus:
    status = ChildStatus(
        name=name,
        unique_id=unique_id,
        reqid=3,
        state=ChildState.INSTALLED,
        mode=Mode.TUNNEL,
        encapsulated=True,
        spi_in=0xC1234567,
        spi_out=0x0000ABCD,
        proposal=parse_proposals(ProtocolId.ESP, "aes128gcm16")[0],
        local_ts=[selector("10.1.0.0/16")],
        remote_ts=[selector("10.2.0.0/16"), selector("10.3.0.1/32")],
        bytes_in=840,
        packets_in=10,
        used_in=1.9,
        bytes_out=84,
        packets_out=1,
        used_out=None,
        rekey_in=3272.5,
        life_in=3600.0,
        installed=12.2,
    )
    return replace(status, **changes)


def ike_status(name: str = "gw", unique_id: int = 4, **changes: Any) -> IkeStatus:
    status = IkeStatus(
        name=name,
        unique_id=unique_id,
        state=IkeState.ESTABLISHED,
        local=Endpoint(ip_address("192.0.2.1"), 4500),
        local_id=Identity.parse("moon.example.org"),
        remote=Endpoint(ip_address("192.0.2.2"), 4500),
        remote_id=Identity.parse("sun.example.org"),
        initiator=True,
        spi_initiator=0x1122334455667788,
        spi_responder=0x00000000000000FF,
        proposal=parse_proposals(ProtocolId.IKE, "aes256-sha256-x25519")[0],
        nat_fake=True,
        nat_any=True,
        established=60.4,
        rekey_in=14000.0,
        children=[child_status()],
    )
    return replace(status, **changes)


class FakeBackend:
    """Implements `ControlBackend` on lists. `called` has the names of what was asked, in order."""

    def __init__(self) -> None:
        self.sas: list[IkeStatus] = []
        self.policies: list[PolicyStatus] = []
        self.conns: dict[str, ConnectionConfig] = {}
        self.shared: dict[str, SharedSecret] = {}
        self.keys: dict[str, PrivateKeySource] = {}
        self.certificates: list[tuple[bytes, bool]] = []
        self.exchanges = ExchangeCounters()
        self.listeners: list[Callable[[DaemonEvent], None]] = []
        self.called: list[str] = []
        self.never = asyncio.Event()
        self.initiating = asyncio.Event()
        self.cancelled = asyncio.Event()

    def publish(self, event: DaemonEvent) -> None:
        for listener in list(self.listeners):
            listener(event)

    def subscribe(self, listener: Callable[[DaemonEvent], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def stats(self) -> DaemonStats:
        return DaemonStats(
            uptime=300.0,
            since=1.7e9,
            ike_total=len(self.sas),
            ike_half_open=1,
            policies=len(self.policies),
            counters={"ike.sent": 5},
            kernel="userspace",
            kernel_reasons=["userspace: works"],
        )

    async def list_sas(
        self, *, ike: str | None = None, ike_id: int | None = None, child: str | None = None, child_id: int | None = None
    ) -> Sequence[IkeStatus]:
        found = []
        for sa in self.sas:
            if ike not in (None, sa.name) or ike_id not in (None, sa.unique_id):
                continue
            children = [each for each in sa.children if child in (None, each.name) and child_id in (None, each.unique_id)]
            if children or (child is None and child_id is None):
                found.append(replace(sa, children=children))
        return found

    def list_policies(self, *, trap: bool, shunt: bool, child: str | None = None, ike: str | None = None) -> Sequence[PolicyStatus]:
        return [each for each in self.policies if (trap and each.mode in ("TUNNEL", "TRANSPORT")) or (shunt and each.mode in ("PASS", "DROP"))]

    def connections(self) -> Mapping[str, ConnectionConfig]:
        return self.conns

    async def load_connection(self, connection: ConnectionConfig) -> None:
        self.conns[connection.name] = connection

    async def reload(self) -> Sequence[str]:
        self.called.append("reload")
        return ["added gw", "0 connections unchanged"]

    async def unload_connection(self, name: str) -> None:
        if self.conns.pop(name, None) is None:
            raise ControlError(f"connection '{name}' not found")

    def load_shared(self, secret: SharedSecret) -> None:
        self.shared[secret.name] = secret

    def unload_shared(self, name: str) -> None:
        self.shared.pop(name, None)

    def shared_names(self) -> Sequence[str]:
        return list(self.shared)

    def load_key(self, key: PrivateKeySource) -> str:
        public = load_private_key(key.data).public_key()
        der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        identifier = hashlib.sha1(der).hexdigest()
        self.keys[identifier] = key
        return identifier

    def unload_key(self, identifier: str) -> None:
        del self.keys[identifier]

    def key_ids(self) -> Sequence[str]:
        return list(self.keys)

    def load_certificate(self, der: bytes, *, authority: bool) -> None:
        self.certificates.append((der, authority))

    def loaded_certificates(self) -> Sequence[LoadedCertificate]:
        store = CredentialStore()
        for der, authority in self.certificates:
            store.load_certificate(der, authority=authority)
        return store.listed()

    def exchange_counters(self) -> ExchangeCounters:
        return self.exchanges

    def clear_credentials(self) -> None:
        self.shared.clear()
        self.keys.clear()
        self.certificates.clear()

    async def initiate(self, *, child: str | None, ike: str | None, timeout: float) -> AsyncIterator[LogLine]:
        self.called.append(f"initiate {child} {ike} {timeout:g}")
        yield LogLine("IKE", 1, "gw", 1, f"initiating {child}")
        yield LogLine("ENC", 2, "gw", 1, "details that nobody asked for")
        if child == "slow":
            self.initiating.set()
            try:
                await self.never.wait()
            finally:
                self.cancelled.set()
        if child == "bad":
            raise ControlError("establishing CHILD_SA 'bad' failed")
        if child == "broken":
            raise RuntimeError("a fault of the backend")
        self.sas.append(ike_status(children=[child_status(child or "net")]))

    async def terminate(
        self,
        *,
        child: str | None = None,
        ike: str | None = None,
        child_id: int | None = None,
        ike_id: int | None = None,
        force: bool = False,
        timeout: float = 0.0,
    ) -> AsyncIterator[LogLine]:
        self.called.append(f"terminate {child} {ike} {child_id} {ike_id} {force} {timeout:g}")
        yield LogLine("IKE", 1, "gw", 1, "deleting")
        self.sas.clear()

    def rekey(self, *, child: str | None = None, ike: str | None = None, child_id: int | None = None, ike_id: int | None = None, reauth: bool = False) -> int:
        self.called.append(f"rekey {child} {ike} {child_id} {ike_id}{' reauth' if reauth else ''}")
        return len(self.sas)

    def redirect(
        self, gateway: GatewayId, *, ike: str | None = None, ike_id: int | None = None, peer_ip: str | None = None, peer_id: Identity | None = None
    ) -> int:
        self.called.append(f"redirect {gateway} {ike} {ike_id} {peer_ip} {peer_id}")
        return len(self.sas)

    async def install(self, child: str, ike: str | None) -> None:
        self.policies.append(PolicyStatus(child, ike or "gw", "TUNNEL", [selector("10.1.0.0/16")], [selector("10.2.0.0/16")], 3))

    async def uninstall(self, child: str, ike: str | None) -> None:
        kept = [each for each in self.policies if each.child != child]
        if len(kept) == len(self.policies):
            raise ControlError(f"policy '{child}' not found")
        self.policies = kept

    def mpls_rows(self, table: str, vrf: str | None = None) -> Iterator[dict[str, str | list[str]]]:
        if table != "lfib":
            raise ControlError("the table is one of lfib, vrfs and labels")
        self.called.append(f"lfib {vrf}")
        yield {"label": "100", "space": "platform", "paths": ["out of VRF red (pipe)"], "owner": "static", "state": "ok"}
        yield {"vrf": "red", "prefix": "10.0.0.0/25", "paths": ["100 to pe (pipe)"], "owner": "static", "state": "ok"}

    def trace_from_vrf(self, vrf: str, destination: IPAddress) -> Sequence[Step]:
        return [Step(f"{destination} in VRF {vrf}", "no route"), Step("result", "dropped: mpls no route")]

    def trace_from_peer(self, peer: str, labels: Sequence[Label], destination: IPAddress | None) -> Sequence[Step]:
        return [Step("result", f"{peer} {labels} {destination}")]

    async def wait(self, child: str, timeout: float) -> None:
        self.called.append(f"wait {child} {timeout:g}")
        if child == "bad":
            raise ControlError("'bad' is not up after 1000 ms")


class ServedBackend:
    """A fake daemon whose control server runs on an event loop in a thread, for clients that block."""

    def __init__(self, path: Path, **config: Any) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.backend = self.call(self._make())
        self.server = ControlServer(self.backend, DaemonConfig(control_socket=path, **config))
        self.call(self.server.start())

    async def _make(self) -> FakeBackend:
        return FakeBackend()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def publish(self, event: DaemonEvent) -> None:
        async def run() -> None:
            self.backend.publish(event)

        self.call(run())

    def stop(self) -> None:
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)
        self.loop.close()


__all__ = ["ChildRekeyed", "ChildUpDown", "FakeBackend", "IkeRekeyed", "IkeUpDown", "LogLine", "ServedBackend", "child_status", "ike_status"]
