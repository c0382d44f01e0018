"""All that a network can do to two peers, up to a bound: every order of deliveries, with datagrams lost, doubled and held back beyond their retransmission.

Peers cannot be copied, so a path is a list of choices that is walked anew from the start; a state that was seen before is not gone on from again.
What is left open by a path's choices goes on as it would on a good network, until nothing is under way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kernel_shim.model import Direction, Endpoint
from lab.ike_pair import Datagram, Pair, Peer
from vpnd.ike.fragments import Outgoing
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import Proposal
from vpnd.ike.sa import IkeSa
from vpnd.ike.state import Child
from vpnd.ike.steps import IkeCrypto

Act = Callable[[Pair, Peer], None]
Choice = tuple[str, int]  # what, and the number of the datagram in flight or of the peer

HORIZON: Final = 120.0  # s; who has nothing to do for so long waits for nothing
LONGEST: Final = 400  # steps of a path


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of each fault a path has. `held`: time passes although datagrams are in flight."""

    lost: int = 0
    doubled: int = 0
    held: int = 0


@dataclass
class World:
    """One path: the pair, what each peer is still to begin, and the faults that are left."""

    pair: Pair
    scripts: tuple[list[Act], list[Act]]
    bounds: Bounds
    check: Callable[[Pair], None]
    labels: dict[tuple[str, int], str] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=lambda: {"lose": 0, "double": 0, "hold": 0})
    trace: list[str] = field(default_factory=list)

    def options(self) -> list[Choice]:
        """The first one is what a good network does. None: the path is at its end."""
        found: list[Choice] = []
        flight = self.pair.flight
        alike: set[bytes] = set()
        for number, datagram in enumerate(flight):
            if datagram.data not in alike:
                alike.add(datagram.data)
                found.append(("deliver", number))
        begun = [("begin", number) for number, script in enumerate(self.scripts) if script]
        found += begun
        if not flight:
            return found or ([("hold", 0)] if self._next() is not None else [])
        for what, limit in (("lose", self.bounds.lost), ("double", self.bounds.doubled)):
            if self.spent[what] < limit:
                found += [(what, number) for name, number in found if name == "deliver"]
        if self.spent["hold"] < self.bounds.held:
            found.append(("hold", 0))
        return found

    def take(self, choice: Choice) -> None:
        what, number = choice
        pair = self.pair
        if what == "begin":
            act = self.scripts[number].pop(0)
            self.trace.append(f"{pair.peers[number].name} begins: {act.__name__}")
            act(pair, pair.peers[number])
        elif what == "hold":
            if pair.flight:
                self.spent["hold"] += 1
            due = self._next()
            if due is not None:
                pair.now = max(pair.now, due)
            self.trace.append(f"time passes: {pair.now:.1f}")
        else:
            datagram = pair.flight[number] if what == "double" else pair.flight.pop(number)
            self.trace.append(f"{what}: {datagram}")
            if what != "deliver":
                self.spent[what] += 1
            if what != "lose":
                pair.deliver(datagram)
        while pair.tick():
            pass
        self._name_children()
        try:
            self.check(pair)
        except AssertionError as failed:
            raise AssertionError(f"{failed}\n" + "\n".join(self.trace)) from failed

    def _next(self) -> float | None:
        deadlines = [deadline for peer in self.pair.peers for sa in peer.sas.values() if (deadline := sa.next_deadline()) is not None]
        deadlines += [end for peer in self.pair.peers for end in peer.lingering.values()]
        due = min(deadlines, default=None)
        return due if due is not None and due < self.pair.now + HORIZON else None

    # States

    def __post_init__(self) -> None:
        self._name_children()

    def _name_children(self) -> None:
        for peer, other in (self.pair.peers, self.pair.peers[::-1]):
            for ike in peer.standing:
                for child in ike.children.values():
                    key = peer.name, child.sa.id
                    if key not in self.labels:
                        self.labels[key] = self.labels.get((peer.name, child.replaces), "") + (peer if child.initiator else other).name

    def fingerprint(self) -> object:
        pair = self.pair
        return (
            tuple(self._of_peer(peer) for peer in pair.peers),
            tuple(sorted(self._of_datagram(datagram) for datagram in pair.flight)),
            tuple(len(script) for script in self.scripts),
            tuple(self.spent.values()),
        )

    def _of_datagram(self, datagram: Datagram) -> tuple[object, ...]:
        data = datagram.data
        number = next((number for number, spi in enumerate(self._spis()) if spi == data[:8]), -1)
        return datagram.sender, number, data[18], data[19], data[20:24], len(data)

    def _spis(self) -> list[bytes]:
        return [bytes(sa.wire_spi_i) for sa in self.pair.a.sas.values()]

    def _of_peer(self, peer: Peer) -> tuple[object, ...]:
        sad = tuple(sorted((self._spi_label(peer, sa.spi, sa.direction), sa.direction.value, sa.id in peer.lingering) for sa in peer.sad.values()))
        return tuple(self._of_ike(peer, ike) for ike in peer.sas.values()), len(peer.larval), sad

    def _spi_label(self, peer: Peer, spi: int, direction: Direction) -> str:
        for ike in peer.standing:
            for child in ike.children.values():
                if spi == (child.sa.inbound.spi if direction is Direction.IN else child.sa.outbound.spi):
                    return self.labels[peer.name, child.sa.id]
        return ""

    def _of_ike(self, peer: Peer, ike: IkeSa) -> tuple[object, ...]:
        def named(child_id: int) -> str:
            return self.labels.get((peer.name, child_id), "")

        def of_child(child: Child) -> tuple[object, ...]:
            return named(child.sa.id), child.state.value, named(child.replaces), child.sends, child.ceased, child.taken, child.redundant

        active, outstanding = ike.active, ike._outstanding
        rival = active.rival if active else None
        return (
            ike.state.value,
            ike.initiator,
            ike.heir is not None,
            ike.undecided is not None,
            ike.overtaken,
            (active.name, named(active.target), active.asked, rival is not None and (named(rival.child_id), rival.ike is not None)) if active else None,
            tuple((task.name, named(task.target)) for task in ike.queue),
            tuple((task.name, named(task.target)) for task in ike.postponed),
            (outstanding.message_id, min(outstanding.copies, 2)) if outstanding else None,
            ike._inbox.expected,
            len(ike._inbox.response.datagrams[0]) if ike._inbox.response else 0,
            ike._fallback is not None,
            tuple(of_child(child) for child in ike.children.values()),
            len(ike.early_deletes),
        )


class Original:
    """A pair between whose peers nothing is under way, to begin any number of paths with."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def copy(self) -> Pair:
        """Configurations, keys and SAs are never written to, so they are not copied; ciphers could not be."""
        shared: list[object] = []
        for peer in self._pair.peers:
            shared += [*peer.connections, peer.credentials, peer.capabilities, peer.settings, peer.resumption, *peer.events, *peer.sad.values()]
            for sa in peer.sas.values():
                shared += [value for value in vars(sa).values() if isinstance(value, IkeCrypto | Proposal | Identity | Endpoint | Outgoing)]
                shared += [part for child in sa.children.values() for part in (child.sa, child.config, child.proposal)]
        return copy.deepcopy(self._pair, {id(thing): thing for thing in shared})


@dataclass
class Explored:
    """`ends`: paths at whose end nothing was under way; the others met a state that was seen before."""

    paths: int = 0
    states: int = 0
    ends: int = 0
    failures: list[str] = field(default_factory=list)


def explore(
    make: Callable[[], Pair],
    scripts: tuple[Sequence[Act], Sequence[Act]],
    bounds: Bounds,
    check: Callable[[Pair], None],
    end: Callable[[Pair], None],
    *,
    most_failures: int = 1,
) -> Explored:
    """Walk every path within `bounds`. `check` looks at the pair after each step, `end` when nothing is under way any more."""
    explored = Explored()
    seen: set[object] = set()
    open_paths: list[list[Choice]] = [[]]
    while open_paths and len(explored.failures) < most_failures:
        path = open_paths.pop()
        explored.paths += 1
        world = World(make(), (list(scripts[0]), list(scripts[1])), bounds, check)
        try:
            for choice in path:
                world.take(choice)
            for _ in range(LONGEST):
                fingerprint = world.fingerprint()
                if fingerprint in seen:
                    break
                seen.add(fingerprint)
                options = world.options()
                if not options:
                    explored.ends += 1
                    try:
                        end(world.pair)
                    except AssertionError as failed:
                        raise AssertionError(f"{failed}\n" + "\n".join(world.trace)) from failed
                    break
                open_paths += [[*path, other] for other in options[1:]]
                path = [*path, options[0]]
                world.take(options[0])
            else:
                raise AssertionError("no end\n" + "\n".join(world.trace))
        except AssertionError as failed:
            explored.failures.append(str(failed))
    explored.states = len(seen)
    return explored
