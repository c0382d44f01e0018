"""The kernels of `lab.drift`: our shim behind a lossy proxy, and Linux behind lossy sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from dataplane_pair import Gateway
from pfkey_support import SocketEdge

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.channel.af_key import AfKeyChannel
from kernel_shim.channel.api import KernelChannel
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import KernelError, Policy, SaId, SaState
from lab.channel_proxy import ChannelProxy
from lab.drift import HERE, OUR_NETWORK, Tables, network_of
from lab.lossy_sockets import ROOMY, Losses, LossyAfKeyTransport, lossy_netlink
from lab.namespaces import Namespace

GCM = EspAlgorithm(EncryptionId.AES_GCM_16, 128)
CBC = EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA1_96)
SQUEEZE_SECONDS = 0.05


class ShimBed:
    """A disturbance cuts the connection."""

    algorithm: EspAlgorithm | None = GCM
    encapsulated = True
    asks = False

    def __init__(self, directory: Path, *, loss: float, seed: int) -> None:
        self._engine = Gateway(seed).engine
        self._edge = SocketEdge(directory / "kernel", self._engine)
        self._path = directory / "proxy"
        self.proxy = ChannelProxy(self._path, directory / "kernel", loss=loss, seed=seed)

    async def connect(self) -> KernelChannel:
        channel = PfKeyChannel(self._path)
        await channel.open()
        return channel

    async def disturb(self, traps: Collection[int]) -> None:
        self.proxy.cut()

    async def send(self, traps: Collection[int]) -> None:
        """`asks` is unset."""

    async def tables(self) -> Tables:
        return _tables(self._engine.policies(), {status.sa.id: status.state for status in self._engine.sas()})

    async def take_away(self, policies: Sequence[Policy], sas: Sequence[SaId]) -> None:
        for policy in policies:
            self._engine.delete_policy(policy.direction, policy.selector)
        for sa in sas:
            self._engine.delete_sa(sa)

    def lost_messages(self) -> int:
        return self.proxy.lost

    async def close(self) -> None:
        self.proxy.close()
        self._edge.close()


class LinuxBed:
    """A disturbance makes the receive buffers so small that the kernel overruns them.

    In the network namespace of the calling thread, which `prepare` made a host of.
    """

    def __init__(self, kind: str, *, loss: float, seed: int, esp: bool = True) -> None:
        self._kind = kind
        self._losses = Losses(loss, seed)
        self._esp = esp
        self._plain: KernelChannel | None = None
        self.algorithm = (GCM if kind == "xfrm" else CBC) if esp else None
        self.encapsulated = False
        self.asks = True

    async def connect(self) -> KernelChannel:
        if self._kind == "pfkey":
            channel: KernelChannel = AfKeyChannel(require_esp=self._esp, transport=LossyAfKeyTransport(self._losses))
            await channel.open()
            return channel
        channel = XfrmChannel(require_esp=self._esp)
        with lossy_netlink(self._losses):
            await channel.open()
        return channel

    async def disturb(self, traps: Collection[int]) -> None:
        self._losses.squeeze()
        await self.send(traps)
        await asyncio.sleep(SQUEEZE_SECONDS)
        self._losses.squeeze(ROOMY)

    async def send(self, traps: Collection[int]) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((str(OUR_NETWORK[1]), 0))
            for number in traps:
                with suppress(OSError):  # held back for want of an SA
                    sender.sendto(b"x", (str(network_of(number)[5]), 9))

    async def _looking(self) -> KernelChannel:
        if self._plain is None:
            self._plain = XfrmChannel(listens=False, require_esp=False) if self._kind == "xfrm" else AfKeyChannel(listens=False, require_esp=False)
            await self._plain.open()
        return self._plain

    async def tables(self) -> Tables:
        plain = await self._looking()
        return _tables(await plain.policies(), {status.sa.id: status.state for status in await plain.sas()})

    async def take_away(self, policies: Sequence[Policy], sas: Sequence[SaId]) -> None:
        plain = await self._looking()
        for policy in policies:
            with suppress(KernelError):
                await plain.delete_policy(policy.direction, policy.selector)
        for sa in sas:
            with suppress(KernelError):
                await plain.delete_sa(sa)

    def lost_messages(self) -> int:
        return self._losses.lost

    async def close(self) -> None:
        plain = await self._looking()
        await plain.flush_policies()
        await plain.flush_sas()
        await plain.close()


def prepare(namespace: Namespace) -> None:
    """A host of both networks' addresses with a way to everywhere."""
    namespace.ip(
        "link add out type veth peer name nowhere",
        "link set out up",
        "link set nowhere up",
        f"addr add {OUR_NETWORK[1]}/16 dev out",
        f"addr add {HERE}/24 dev out",
        "neigh add 192.0.2.2 lladdr 02:00:00:00:00:01 dev out nud permanent",
        "route add default via 192.0.2.2",
    )


def _tables(policies: Sequence[Policy], states: dict[SaId, SaState]) -> Tables:
    return Tables(policies, frozenset(sa for sa, state in states.items() if state is not SaState.LARVAL))
