"""What the `mpls` section says becomes what should stand in the kernel; the labels that were given are kept over restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import structlog

from kernel_shim.model import NO_MARK, Action, AddressRange, Direction, IPAddress, KernelError, PortRange, Selector
from kernel_shim.mpls.allocator import LabelsExhausted
from kernel_shim.mpls.encapsulation import UDP_PORT, Encapsulation
from kernel_shim.mpls.labels import FIRST_LABEL, LAST_LABEL, Label
from kernel_shim.mpls.node import Tunnel
from kernel_shim.reasons import DropReason
from vpnd.control.backend import ControlError
from vpnd.daemon.fpm import RoutingFeed
from vpnd.daemon.kernel_side import KernelSide
from vpnd.daemon.label_synchroniser import STATIC
from vpnd.mpls import listing
from vpnd.mpls.guard import without_sa
from vpnd.mpls.model import MplsConfig
from vpnd.mpls.plan import Assignment, assign, entries
from vpnd.mpls.trace import Step, Trace

LABEL_FILE: Final = "labels.json"  # in the state directory
MAX_FILE: Final = 64 << 20  # octets; as many names as there are labels

_GUARD: Final = "labels in clear"  # with a tunnel, the owner of the policies against them

log = structlog.get_logger("mpls")


class Mpls:
    """`label_file` remembers what each label was given for; a label follows from its name in most cases, so a lost file costs little.

    `guards`: the kernel does not see to it that labels leave and come in SAs alone, so policies do.
    """

    def __init__(self, kernel: KernelSide, label_file: Path | None = None, feed: RoutingFeed | None = None, *, guards: bool = False) -> None:
        self._kernel = kernel
        self.labels: Final = kernel.labels
        self._feed = feed
        self._file = label_file
        self._guards = guards
        self._guarded: frozenset[Tunnel] = frozenset()
        self.config = MplsConfig()
        self.given: Assignment = _read(label_file) if label_file is not None else {}

    def plan(self, config: MplsConfig) -> Assignment:
        """The labels that it would have. Raises ControlError when they do not suffice; nothing has changed."""
        try:
            return assign(config, self.given)
        except LabelsExhausted as error:
            raise ControlError(f"mpls.label_range: {error}") from error

    async def load(self, config: MplsConfig) -> int:
        """From now on this counts; how many entries of the label node differ from before. Returns when the kernel was told, if there is one.

        ControlError as `plan`, or when the kernel does not take what keeps labels from leaving in clear: then nothing has changed.
        """
        given = self.plan(config)
        wanted = entries(config, given)
        guarded = frozenset(entry for entry in wanted if isinstance(entry, Tunnel)) if self._guards else frozenset()
        await self._guard(guarded - self._guarded)
        if given != self.given:
            self.given = given
            self._remember()
        self.config = config
        changed = self.labels.replace(STATIC, wanted)
        if self._feed is not None:
            self._feed.configure(config)
        await self.labels.settled()
        for tunnel in self._guarded - guarded:
            await self._kernel.release((_GUARD, tunnel))
        self._guarded = guarded
        return changed

    async def _guard(self, tunnels: Iterable[Tunnel]) -> None:
        claimed: list[Tunnel] = []
        for tunnel in tunnels:
            try:
                await self._kernel.claim((_GUARD, tunnel), list(without_sa(tunnel)))
            except (KernelError, TimeoutError) as error:
                for other in claimed:
                    await self._kernel.release((_GUARD, other))
                raise ControlError(f"peer {tunnel.peer}: nothing would keep labels from leaving in clear: {error}") from error
            claimed.append(tunnel)

    # What people look at

    def rows(self, table: str, vrf: str | None = None) -> Iterator[listing.Row]:
        """`table` is `lfib`, `vrfs` or `labels`. Raises ControlError for another."""
        labels = self.labels
        if table == "lfib":
            return listing.lfib(labels.entries(), labels.origin, vrf)
        if table == "vrfs":
            return listing.vrfs(labels.entries(), labels.origin, self.config)
        if table == "labels":
            return listing.labels(labels.entries(), labels.origin, self.given)
        raise ControlError("the table is one of lfib, vrfs and labels")

    def trace_from_vrf(self, vrf: str, destination: IPAddress) -> list[Step]:
        """Raises ControlError when there is no such VRF in the kernel."""
        try:
            return Trace(self.labels.standing, self._protection).departure(vrf, destination)
        except KeyError:
            raise ControlError(f"the kernel has no VRF '{vrf}'") from None

    def trace_from_peer(self, peer: str, labels: Sequence[Label], destination: IPAddress | None) -> list[Step]:
        """Raises ControlError when the kernel has no tunnel to such a peer."""
        try:
            return Trace(self.labels.standing, self._protection).arrival(peer, labels, destination)
        except KeyError:
            raise ControlError(f"the kernel has no tunnel to a peer '{peer}'") from None

    def _protection(self, tunnel: Tunnel) -> list[str]:
        """What the SPD as it should be, and the SAs of this daemon, say to a tunnel."""
        covering = [policy for policy in self._kernel.table.desired() if policy.direction is Direction.OUT and _covers(policy.selector, tunnel)]
        policy = min(covering, key=lambda policy: policy.priority, default=None)
        if policy is None or policy.action is Action.BYPASS:
            lines = [f"policy {policy.selector}: bypass" if policy else "no policy"]
            return [*lines, f"sent to {tunnel.peer} in clear" if tunnel.managed else f"dropped: {DropReason.POLICY_DISCARD.text}"]
        lines = [f"policy {policy.selector}: {policy.action.name.lower()}, priority {policy.priority}"]
        if policy.action is Action.DISCARD:
            return [*lines, f"dropped: {DropReason.POLICY_DISCARD.text}"]
        reqids = {template.reqid for template in policy.templates}
        found = [sa for sa in self._kernel.standing_sas if sa.direction is Direction.OUT and sa.reqid in reqids and sa.destination == tunnel.remote]
        if not found:
            return [*lines, f"waits: no SA to {tunnel.remote} yet, one is asked for"]
        return [*lines, *(f"SA {sa.spi:08x} {sa.mode.name.lower()} {sa.source} to {sa.destination}" for sa in found), f"sent to {tunnel.peer}"]

    def _remember(self) -> None:
        if self._file is None:
            return
        temporary = self._file.with_name(self._file.name + ".new")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.given))
            os.replace(temporary, self._file)
        except OSError as error:
            log.warning("labels not remembered", file=str(self._file), reason=error.strerror)


def _read(path: Path) -> dict[str, Label]:
    try:
        with path.open() as file:
            found = json.loads(file.read(MAX_FILE))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("labels of an earlier run not read", file=str(path), reason=str(error))
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: Label(label) for name, label in found.items() if isinstance(label, int) and FIRST_LABEL <= label <= LAST_LABEL}


def _covers(selector: Selector, tunnel: Tunnel) -> bool:
    """Whether every packet of the tunnel matches; the source port of MPLS-in-UDP is the flow's."""
    if selector.mark != NO_MARK:
        return False
    if selector.protocol not in (0, tunnel.encapsulation) or selector.version != tunnel.local.version:
        return False
    if tunnel.encapsulation is Encapsulation.UDP and not (selector.source_ports.any and selector.destination_ports.contains(PortRange(UDP_PORT, UDP_PORT))):
        return False
    near, far = AddressRange(tunnel.local, tunnel.local), AddressRange(tunnel.remote, tunnel.remote)
    return selector.source.contains(near) and selector.destination.contains(far)
