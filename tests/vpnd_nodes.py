"""Two key managers in one process: real cores, a kernel in memory each, and a network that is a function call. Their tests run in `virtual_time`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from vpnd_fakes import FakeChannel, FakeKernel

from kernel_shim.channel.api import KernelChannel
from kernel_shim.model import Direction, Endpoint
from vpnd.auth.credentials import CredentialStore
from vpnd.config import load_text
from vpnd.config.model import DaemonConfig
from vpnd.control.backend import LogLine
from vpnd.daemon.demands import Demands
from vpnd.daemon.kernel_side import KernelSide
from vpnd.daemon.manager import Host, Manager
from vpnd.daemon.operations import Operations
from vpnd.gate import GateSettings
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.exchanges.crash_detection import TokenMaker
from vpnd.telemetry.counters import Counters

CONFIG = """
connections {{
  site {{
    local_addrs = {local}
    remote_addrs = {remote}
    proposals = aes128gcm16-prfsha256-x25519
{connection}
    local {{ auth = psk
      id = {local_id} }}
    remote {{ auth = psk
      id = {remote_id} }}
    children {{
      net {{
        local_ts = {local_ts}
        remote_ts = {remote_ts}
        esp_proposals = aes128gcm16
        start_action = {start}
{child}
      }}
    }}
  }}
}}
secrets {{ ike-1 {{
  id-1 = a.example
  id-2 = b.example
  secret = "{secret}"
}} }}
"""

A, B = ip_address("127.0.0.11"), ip_address("127.0.0.12")
DEFAULTS = DaemonConfig()
HASTY = Retransmission(0.05, 1.2, 3)


@dataclass
class Network:
    nodes: dict[object, Node] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)
    cut: bool = False

    def carry(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        self.sent.append(data)
        node = self.nodes.get(remote.address)
        if node is not None and not self.cut:
            asyncio.get_running_loop().call_soon(node.manager.datagram, remote, local, data)


class Node:
    def __init__(
        self,
        network: Network,
        config: str,
        address: object,
        *,
        gate: GateSettings | None = None,
        settings: DaemonConfig = DEFAULTS,
        retransmission: Retransmission = HASTY,
        host: Host | None = None,
    ) -> None:
        self.network = network
        self.kernel = FakeKernel()
        self.channels: list[FakeChannel] = []
        loaded = load_text(config, Path("/nonexistent"))
        counters = Counters()
        side = KernelSide(self._connect, counters)
        ike = IkeSettings(retransmission=retransmission, rekeyed_delay=0.02)
        self.manager = Manager(
            side, self, CredentialStore.of(loaded.configuration), ike, gate or GateSettings(), counters, host=host, tokens=TokenMaker(str(address).encode())
        )
        self.demands = Demands(self.manager, mark=1)
        self.operations = Operations(self.manager, self.demands, settings)
        side.event = self.demands.kernel_event
        side.lost = self.demands.ends.sas_lost
        self.configuration = loaded.configuration
        self.lines: list[str] = []
        self.manager.news.subscribe(lambda event: self.lines.append(event.text) if isinstance(event, LogLine) else None)
        network.nodes[address] = self

    async def _connect(self) -> KernelChannel:
        self.channels.append(FakeChannel(self.kernel))
        return self.channels[-1]

    async def start(self) -> None:
        await self.manager.kernel.open()
        await self.operations.load(self.configuration)

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        self.network.carry(local, remote, data)

    def send_keepalive(self, local: Endpoint, remote: Endpoint) -> None:
        pass

    def spis(self, direction: Direction) -> set[int]:
        return {sa.spi for sa in self.kernel.sas.values() if sa.direction is direction}

    async def up(self) -> None:
        async for _line in self.operations.initiate(child="net", ike=None, timeout=60.0):
            pass

    async def down(self, **what: object) -> None:
        async for _line in self.operations.terminate(timeout=60.0, **what):  # type: ignore[arg-type]
            pass


def config(side: str, start: str = "none", secret: str = "between us", connection: str = "", child: str = "") -> str:
    """`connection` and `child`: further lines of these sections."""
    near, far = ("a", "b") if side == "a" else ("b", "a")
    address, network = {"a": A, "b": B}, {"a": "10.1.0.0/16", "b": "10.2.0.0/16"}
    return CONFIG.format(
        local=address[near],
        remote=address[far],
        local_id=f"{near}.example",
        remote_id=f"{far}.example",
        local_ts=network[near],
        remote_ts=network[far],
        start=start,
        secret=secret,
        connection=connection,
        child=child,
    )


async def pair(
    start_a: str = "none",
    start_b: str = "none",
    secret_b: str = "between us",
    *,
    connection: str = "",
    child: str = "",
    settings: DaemonConfig = DEFAULTS,
    retransmission: Retransmission = HASTY,
) -> tuple[Node, Node, Network]:
    network = Network()
    a = Node(network, config("a", start_a, connection=connection, child=child), A, settings=settings, retransmission=retransmission)
    b = Node(network, config("b", start_b, secret_b, connection=connection, child=child), B, settings=settings, retransmission=retransmission)
    await b.start()
    await a.start()
    return a, b, network


async def until(condition: object) -> None:
    async with asyncio.timeout(60):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)


def mirrored(a: Node, b: Node, children: int = 1) -> bool:
    """Both SADs hold the same SAs, in opposite directions."""
    return (
        a.spis(Direction.OUT) == b.spis(Direction.IN)
        and a.spis(Direction.IN) == b.spis(Direction.OUT)
        and len(a.spis(Direction.OUT)) == len(a.spis(Direction.IN)) == children
    )
