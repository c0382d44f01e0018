"""The SAD (RFC 4301 section 4.4.2): inbound by destination and SPI, outbound by reqid, and the clock of their lifetimes."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import Final, TypeVar

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.esp.cipher import EspCipher, make_cipher
from kernel_shim.model import (
    ANY_PROTOCOL,
    Direction,
    Expire,
    Flow,
    IPAddress,
    KernelError,
    KernelEvent,
    Move,
    ReqId,
    SaId,
    SaState,
    SecurityAssociation,
    SpiRequest,
    TrafficSelector,
)
from kernel_shim.sa.entry import SaEntry
from kernel_shim.sa.replay import LARGEST_WINDOW, SMALLEST_WINDOW
from kernel_shim.sa.spi import LOWEST_SPI, choose_spi

# Limits of this implementation
MAX_SAS: Final = 262_144
LARVAL_SECONDS: Final = 165.0  # as long as a key manager may retransmit an exchange (RFC 7296 section 2.4: "several minutes")
REMEMBERED_KEYS: Final = 65_536  # outbound keys that are refused for good; 16 bytes each

K = TypeVar("K")

_NO_ALGORITHM: Final = EspAlgorithm(EncryptionId.NULL, 0)
_STALE_DEADLINES: Final = 64


class Sad:
    """Every change of what a lookup would find calls `changed`; every expiry goes to `emit`. Clock values are monotonic seconds.

    `plain`: ESP goes without UDP too.
    """

    def __init__(
        self,
        entropy: Callable[[int], bytes],
        emit: Callable[[KernelEvent], None],
        changed: Callable[[], None],
        discarded: Callable[[SaEntry], None],
        slot: int = 0,
        *,
        plain: bool = False,
    ) -> None:
        self._entropy, self._emit, self._changed, self._discarded, self._slot, self._plain = entropy, emit, changed, discarded, slot, plain
        self._entries: dict[SaId, SaEntry] = {}
        self._inbound: dict[int, tuple[SaEntry, ...]] = {}
        self._outbound: dict[ReqId, list[SaEntry]] = {}
        self._outbound_to: dict[IPAddress, list[SaEntry]] = {}
        self._deadlines: list[tuple[float, int, SaEntry]] = []
        self._serial = 0
        self._keys: dict[bytes, None] = {}
        self._key_secret: Final = entropy(16)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SaEntry]:
        return iter(tuple(self._entries.values()))

    # Lookup

    def get(self, sa: SaId) -> SaEntry:
        entry = self._entries.get(sa)
        if entry is None:
            raise KernelError(errno.ESRCH, f"no SA {sa.spi:#x} to {sa.destination}")
        return entry

    def inbound(self, spi: int) -> tuple[SaEntry, ...]:
        """The inbound SAs with this SPI, one for each destination address."""
        return self._inbound.get(spi, ())

    def outbound(self, reqid: ReqId) -> list[SaEntry]:
        """The outbound SAs of `reqid`, newest last. Not to be changed."""
        return self._outbound.get(reqid, [])

    def outbound_to(self, destination: IPAddress) -> list[SaEntry]:
        """The outbound SAs to that address, of whatever reqid, newest last. Not to be changed."""
        return self._outbound_to.get(destination, [])

    # Changes

    def reserve(self, request: SpiRequest, now: float) -> SaEntry:
        """GETSPI: a larval inbound SA. EINVAL, ENOENT as `choose_spi`; ENOBUFS when the SAD is full."""
        self._check_room()
        spi = choose_spi(request.minimum, request.maximum, self._slot, self._inbound, self._entropy)
        sa = SecurityAssociation(spi, request.source, request.destination, Direction.IN, request.mode, request.reqid, _NO_ALGORITHM, acquire=request.acquire)
        entry = SaEntry(sa, None, self._next_serial(), now)
        entry.hard_at = now + LARVAL_SECONDS
        self._insert(entry)
        return entry

    def add(self, sa: SecurityAssociation, now: float) -> SaEntry:
        """EEXIST when it stands and is not larval, or when an outbound key was used before; EINVAL, EPROTONOSUPPORT for what cannot be."""
        present = self._entries.get(sa.id)
        if present is not None:
            if present.state is SaState.LARVAL:
                return self.update(sa, now)
            raise KernelError(errno.EEXIST, f"SA {sa.spi:#x} to {sa.destination} exists")
        self._check_room()
        entry = SaEntry(sa, self._cipher(sa), self._next_serial(), now)
        self._insert(entry)
        return entry

    def update(self, sa: SecurityAssociation, now: float) -> SaEntry:
        """ESRCH when it does not stand; EINVAL for another key, mode, reqid, ESN or window than it has.

        A peer that moved keeps its SA: one that has this SPI and this key, to another destination, becomes this one. Sequence
        numbers, window and counters go on.
        """
        entry = self._entries.get(sa.id) or self._elsewhere(sa) or self.get(sa.id)
        if entry.state is SaState.LARVAL:
            cipher = self._cipher(sa)
            larval, entry = entry, SaEntry(sa, cipher, self._next_serial(), now)
            entry.waiting, entry.waiting_octets, larval.waiting = larval.waiting, larval.waiting_octets, []
            self._remove(larval)
            self._discarded(larval)
            self._insert(entry)
            return entry
        if sa.direction is not entry.sa.direction or sa.mode is not entry.sa.mode or not _same_keys(sa, entry.sa):
            raise KernelError(errno.EINVAL, f"SA {sa.spi:#x} has other keys, direction or mode")
        if (sa.esn, sa.replay_window) != (entry.sa.esn, entry.sa.replay_window):
            raise KernelError(errno.EINVAL, f"SA {sa.spi:#x} counts its packets otherwise")
        if sa.reqid != entry.sa.reqid:
            raise KernelError(errno.EINVAL, f"SA {sa.spi:#x} is of reqid {entry.sa.reqid}")
        self._validate(sa)
        self._configure(entry, sa)
        return entry

    def move(self, moves: Sequence[Move]) -> int:
        """Give the SAs between the old addresses of each move the new ones; how many. All else of them stays.

        EEXIST, and nothing has moved, when another SA has the new name of one.
        """
        moved: dict[SaId, tuple[SaEntry, SecurityAssociation]] = {}
        for entry in self._entries.values():
            sa = entry.sa
            for it in moves:
                if (
                    (it.mode, it.old_source, it.old_destination) == (sa.mode, sa.source, sa.destination)
                    and it.reqid in (0, sa.reqid)
                    and entry.state is not SaState.LARVAL
                ):
                    new = replace(sa, source=it.new_source, destination=it.new_destination)
                    if new.id != sa.id and (new.id in self._entries or new.id in moved):
                        raise KernelError(errno.EEXIST, f"SA {new.spi:#x} to {new.destination} exists")
                    moved[new.id] = entry, new
                    break
        for entry, new in moved.values():
            self._configure(entry, new)
        return len(moved)

    def _configure(self, entry: SaEntry, sa: SecurityAssociation) -> None:
        if sa.id != entry.sa.id:
            del self._entries[entry.sa.id]
            self._entries[sa.id] = entry
            if sa.direction is Direction.OUT:
                _take_out(self._outbound_to, entry.sa.destination, entry)
                self._outbound_to.setdefault(sa.destination, []).append(entry)
                self._outbound_to[sa.destination].sort(key=lambda other: other.serial)
        entry.configure(sa)
        self._watch(entry)
        self._changed()

    def delete(self, sa: SaId) -> SaEntry:
        entry = self.get(sa)
        self._remove(entry)
        self._discarded(entry)
        return entry

    def flush(self) -> int:
        entries = list(self._entries.values())
        self._entries.clear()
        self._inbound.clear()
        self._outbound.clear()
        self._outbound_to.clear()
        self._deadlines.clear()
        for entry in entries:
            entry.state = SaState.DEAD
            self._discarded(entry)
        self._changed()
        return len(entries)

    # Use

    def charge(self, entry: SaEntry, packets: int, octets: int, now: float) -> None:
        """Count what went through, and expire what that used up."""
        entry.packets += packets
        entry.octets += octets
        entry.used = now
        if entry.packets >= entry.soft_packets or entry.octets >= entry.soft_octets or entry.sequence >= entry.soft_sequence:
            self._expire_soft(entry)
        if entry.packets >= entry.hard_packets or entry.octets >= entry.hard_octets or entry.sequence >= entry.sequence_limit:
            self.expire_hard(entry)

    def expire_hard(self, entry: SaEntry) -> None:
        """The SA is used up: it leaves the SAD and the key manager hears of it."""
        if self._entries.get(entry.sa.id) is not entry:
            return
        self._remove(entry)
        self._discarded(entry)
        self._emit(Expire(entry.sa.id, entry.sa.reqid, hard=True))

    @property
    def deadlines(self) -> int:
        """How many are kept; those of SAs that are gone are thrown out when they are most of them."""
        return len(self._deadlines)

    def next_deadline(self) -> float | None:
        while self._deadlines and not self._due_at(self._deadlines[0]):
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def tick(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            item = heappop(self._deadlines)
            if not self._due_at(item):
                continue
            deadline, _, entry = item
            if deadline == entry.hard_at:
                self.expire_hard(entry)
            else:
                entry.soft_at = None
                self._expire_soft(entry)
                self._watch(entry)

    # Inside

    def _elsewhere(self, sa: SecurityAssociation) -> SaEntry | None:
        """The SA to or from another address that has the SPI and the keys of this one: no two have both."""
        candidates = self.inbound(sa.spi) if sa.direction is Direction.IN else self.outbound(sa.reqid)
        return next((entry for entry in candidates if entry.sa.spi == sa.spi and entry.state is not SaState.LARVAL and _same_keys(entry.sa, sa)), None)

    def _expire_soft(self, entry: SaEntry) -> None:
        if entry.state is SaState.MATURE:
            entry.state = SaState.DYING
            self._changed()
            self._emit(Expire(entry.sa.id, entry.sa.reqid, hard=False))

    def _insert(self, entry: SaEntry) -> None:
        sa = entry.sa
        self._entries[sa.id] = entry
        if sa.direction is Direction.IN:
            self._inbound[sa.spi] = (*self._inbound.get(sa.spi, ()), entry)
        else:
            self._outbound.setdefault(sa.reqid, []).append(entry)
            self._outbound_to.setdefault(sa.destination, []).append(entry)
        self._watch(entry)
        self._changed()

    def _remove(self, entry: SaEntry) -> None:
        sa = entry.sa
        del self._entries[sa.id]
        if sa.direction is Direction.IN:
            left = tuple(other for other in self._inbound[sa.spi] if other is not entry)
            if left:
                self._inbound[sa.spi] = left
            else:
                del self._inbound[sa.spi]
        else:
            _take_out(self._outbound, sa.reqid, entry)
            _take_out(self._outbound_to, sa.destination, entry)
        entry.state = SaState.DEAD
        self._changed()

    def _watch(self, entry: SaEntry) -> None:
        for deadline in (entry.soft_at, entry.hard_at):
            if deadline is not None:
                self._serial += 1
                heappush(self._deadlines, (deadline, self._serial, entry))
        if len(self._deadlines) > 4 * len(self._entries) + _STALE_DEADLINES:
            self._deadlines = list(dict.fromkeys(item for item in self._deadlines if self._due_at(item)))
            heapify(self._deadlines)

    def _due_at(self, item: tuple[float, int, SaEntry]) -> bool:
        deadline, _, entry = item
        return entry.state is not SaState.DEAD and deadline in (entry.soft_at, entry.hard_at)

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _check_room(self) -> None:
        if len(self._entries) >= MAX_SAS:
            raise KernelError(errno.ENOBUFS, f"the SAD holds {MAX_SAS} SAs")

    def _validate(self, sa: SecurityAssociation) -> None:
        if sa.spi < LOWEST_SPI or sa.spi > 0xFFFFFFFF:
            raise KernelError(errno.EINVAL, f"SPI {sa.spi:#x}")
        if sa.encapsulation is None and not self._plain:
            raise KernelError(errno.EPROTONOSUPPORT, "ESP without UDP encapsulation")
        if sa.source.version != sa.destination.version:
            raise KernelError(errno.EINVAL, "outer addresses of two families")
        if sa.replay_window and not SMALLEST_WINDOW <= sa.replay_window <= LARGEST_WINDOW:
            raise KernelError(errno.EINVAL, f"replay window {sa.replay_window}")

    def _cipher(self, sa: SecurityAssociation) -> EspCipher:
        self._validate(sa)
        try:
            cipher = make_cipher(sa.algorithm, sa.encryption_key, sa.integrity_key, sa.spi, sa.esn, self._entropy)
        except ValueError as error:
            raise KernelError(errno.EINVAL, str(error)) from None
        if sa.direction is Direction.OUT and sa.algorithm.counts_its_ivs:
            self._refuse_used_key(sa)
        return cipher

    def _refuse_used_key(self, sa: SecurityAssociation) -> None:
        """A second SA with the same key would start its sequence, and so its nonces, over again."""
        fingerprint = hashlib.blake2b(sa.encryption_key.reveal(), digest_size=16, key=self._key_secret).digest()
        if fingerprint in self._keys:
            raise KernelError(errno.EEXIST, "this outbound key was used before")
        if len(self._keys) >= REMEMBERED_KEYS:
            del self._keys[next(iter(self._keys))]
        self._keys[fingerprint] = None


def _take_out(table: dict[K, list[SaEntry]], key: K, entry: SaEntry) -> None:
    table[key].remove(entry)
    if not table[key]:
        del table[key]


def _same_keys(one: SecurityAssociation, other: SecurityAssociation) -> bool:
    return one.algorithm == other.algorithm and one.encryption_key == other.encryption_key and one.integrity_key == other.integrity_key


def covers(sa: SecurityAssociation, flow: Flow) -> bool:
    """Whether the SA's own selectors cover `flow` (RFC 4301 section 4.4.2.1); an empty side covers everything."""
    return _side(sa.source_selectors, flow.source, flow.protocol, flow.source_port) and _side(
        sa.destination_selectors, flow.destination, flow.protocol, flow.destination_port
    )


def _side(selectors: tuple[TrafficSelector, ...], address: IPAddress, protocol: int, port: int) -> bool:
    return not selectors or any(address in s.addresses and s.protocol in (ANY_PROTOCOL, protocol) and port in s.ports for s in selectors)
