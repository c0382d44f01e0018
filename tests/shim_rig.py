"""`kernel-shim serve` in a namespace, driven over its PF_KEY socket with fixed keys and no key manager."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import Any, Final

from lab.namespaces import Lab, Namespace
from lab.process import LabError, Process
from lab.topology import Site

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.model import (
    Action,
    AddressRange,
    Direction,
    IPAddress,
    IPNetwork,
    Mode,
    Policy,
    PortRange,
    ReqId,
    SecurityAssociation,
    Selector,
    Spi,
    Template,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret

REPOSITORY: Final = Path(__file__).parent.parent
GCM: Final = EspAlgorithm(EncryptionId.AES_GCM_16, 128)
ANYWHERE: Final = IPv4Network("0.0.0.0/0")


class Shim:
    """One shim process. `restart` after `kill` takes over what the dead one left."""

    def __init__(self, lab: Lab, namespace: Namespace, *options: str) -> None:
        self.namespace = namespace
        self.socket = lab.directory / f"{namespace.role}.sock"
        self._options = options
        self._starts = 0
        self.process: Process = self._start()

    def _start(self) -> Process:
        self._starts += 1
        read, write = os.pipe()
        try:
            argv = [sys.executable, "-m", "kernel_shim.io.main", "serve", "--socket", str(self.socket), "--ready-fd", str(write), *self._options]
            process = self.namespace.start(argv, f"shim{self._starts}", env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, pass_fds=[write])
        finally:
            os.close(write)
        with os.fdopen(read, "rb") as ready:
            if not ready.readline():
                raise LabError(f"the shim ended with status {process.wait()}\n{process.log()}")
        return process

    def restart(self) -> None:
        self.process = self._start()

    def kill(self) -> None:
        """SIGKILL: nothing is taken away in order."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def halted(self) -> Iterator[None]:
        """It stands still meanwhile, and what happens to its host it sees afterwards."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        return self.process.stop()

    def command(self, *words: str) -> str:
        """Another subcommand of `kernel-shim`, its output."""
        argv = [sys.executable, "-m", "kernel_shim.io.main", *words, "--socket", str(self.socket)]
        return self.namespace.run(argv, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}).stdout

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.command("stats", "--json"))
        return found

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[PfKeyChannel]:
        channel = PfKeyChannel(self.socket)
        await channel.open()
        try:
            yield channel
        finally:
            await channel.close()


def policies(
    near: IPAddress, far: IPAddress, local: IPNetwork, remote: IPNetwork, *, mode: Mode = Mode.TUNNEL, protocol: int = 0, remote_port: int | None = None
) -> list[Policy]:
    """What a key manager installs for one CHILD_SA: out, in and forward."""
    ports = PortRange(remote_port, remote_port) if remote_port is not None else PortRange()
    out = Selector(AddressRange.of(local), AddressRange.of(remote), protocol, destination_ports=ports)
    towards, back = Template(mode, ReqId(1), near, far), Template(mode, ReqId(1), far, near)
    return [
        Policy(out, Direction.OUT, Action.PROTECT, 100, (towards,)),
        Policy(out.reversed(), Direction.IN, Action.PROTECT, 100, (back,)),
        Policy(out.reversed(), Direction.FORWARD, Action.PROTECT, 100, (back,)),
    ]


def associations(near: IPAddress, far: IPAddress, near_spi: int, far_spi: int, mode: Mode = Mode.TUNNEL) -> list[SecurityAssociation]:
    """Both directions; the key is derived from the SPI, so that the peers agree."""

    def one(spi: int, source: IPAddress, destination: IPAddress, direction: Direction) -> SecurityAssociation:
        key = Secret(spi.to_bytes(4, "big") * 5)
        return SecurityAssociation(Spi(spi), source, destination, direction, mode, ReqId(1), GCM, key, encapsulation=UdpEncapsulation(), esn=True)

    return [one(near_spi, far, near, Direction.IN), one(far_spi, near, far, Direction.OUT)]


async def install(channel: PfKeyChannel, address: IPAddress, wanted: list[Policy], keys: list[SecurityAssociation]) -> None:
    """Bind, then inbound SAs before outbound ones before policies: a packet finds everything or nothing."""
    for descriptor in await channel.bind(address):
        os.close(descriptor)
    for policy in wanted:
        await channel.update_policy(policy)
    for association in keys:
        await channel.add_sa(association)


def spis(round_number: int) -> tuple[int, int]:
    """Never the same twice: a restarted kernel must not reuse a key."""
    return 0x1000 + round_number, 0x2000 + round_number


async def connect(a: Shim, b: Shim, near: Site, far: Site, *, round_number: int = 0, **shape: Any) -> None:
    """A static tunnel between the sites; `shape` as for `policies`, from the side of `near`."""
    mode = shape.get("mode", Mode.TUNNEL)
    local, remote = shape.pop("local", near.net4), shape.pop("remote", far.net4)
    one, other = spis(round_number)
    mine = policies(near.wan4, far.wan4, local, remote, **shape)
    theirs = [_mirror(policy) for policy in mine]
    async with a.channel() as channel:
        await install(channel, near.wan4, mine, associations(near.wan4, far.wan4, one, other, mode))
    async with b.channel() as channel:
        await install(channel, far.wan4, theirs, associations(far.wan4, near.wan4, other, one, mode))


def _mirror(policy: Policy) -> Policy:
    """The peer's policy for the same packets; its forward policy is for what it lets in, like its inbound one."""
    direction = Direction.IN if policy.direction is Direction.OUT else Direction.OUT
    if policy.direction is Direction.FORWARD:
        selector = policy.selector.reversed()
        template = policy.templates[0]
        swapped = Template(template.mode, template.reqid, template.destination, template.source)
        return Policy(selector, Direction.FORWARD, policy.action, policy.priority, (swapped,))
    return Policy(policy.selector, direction, policy.action, policy.priority, policy.templates)


def host(address: IPAddress) -> IPNetwork:
    return ip_network(f"{address}/{address.max_prefixlen}")


def host_state(namespace: Namespace) -> dict[str, str]:
    """Everything that the shim may touch, as a person would look at it."""
    commands = {
        "rules": "ip rule; ip -6 rule",
        "routes": "ip route show table all; ip -6 route show table all",
        "nftables": "nft list ruleset",
        "links": "ip -o link | cut -d' ' -f2",
        "sysctls": "cd /proc/sys/net && cat ipv4/conf/all/src_valid_mark ipv4/ip_forward ipv6/conf/all/forwarding ipv4/conf/all/rp_filter",
    }
    shown = {name: namespace.run(["sh", "-c", command]).stdout for name, command in commands.items()}
    # The kernel's own link-local addresses come a moment after a link, and expiring entries count down.
    shown["routes"] = "\n".join(line for line in shown["routes"].splitlines() if "fe80" not in line and not re.search(r"^(multicast|anycast) ", line))
    return shown
