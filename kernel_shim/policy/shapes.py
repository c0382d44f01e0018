"""Selectors as masked integers: what the hash tables of the SPD are keyed by.

A full flow key (`flowkey.py`) read as one big-endian integer, with the packet's mark above it, is the *flow number*. A
selector whose ranges are prefixes is a mask and a value over flow numbers: the mask is its *shape*. Ranges are split into
prefixes up to a bound; a selector that would need more of them keeps one range whole, as an interval over one field.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

from kernel_shim.model import AddressRange, PortRange, Selector

# A range of k bits needs up to 2k - 2 prefixes. One entry of the hash tables each; the shapes they add cost every lookup a probe.
MAX_PREFIXES: Final = 32

# Keys are multiplied by this before they are hashed. Python hashes an integer by its remainder modulo 2**61 - 1 and takes
# the low bits, which are nearly all zero in masked flow numbers: tables of many policies would be one long collision.
# Any odd number of about 60 bits without structure will do; a product by it is as unique as its factor.
MIX: Final = 0x9E3779B97F4A7C1


class Field(NamedTuple):
    """A field of the flow number: `number >> shift & (1 << width) - 1`."""

    shift: int
    width: int

    @property
    def full(self) -> int:
        return (1 << self.width) - 1 << self.shift


class Layout(NamedTuple):
    """Where the fields of the flow number are, for one address family."""

    source: Field
    destination: Field
    source_port: Field
    destination_port: Field
    protocol: Field
    mark: Field


def _layout(bits: int) -> Layout:
    return Layout(Field(40 + bits, bits), Field(40, bits), Field(24, 16), Field(8, 16), Field(0, 8), Field(40 + 2 * bits, 32))


LAYOUT_V4: Final = _layout(32)
LAYOUT_V6: Final = _layout(128)


@dataclass(frozen=True, slots=True)
class Interval:
    """One range that stays a range: `low <= field <= high`."""

    field: Field
    low: int
    high: int


class Bounds(NamedTuple):
    """A selector as ranges of fields, to be checked one by one: (shift, width mask, low, high)."""

    ranges: tuple[tuple[int, int, int, int], ...]

    def match(self, number: int) -> bool:
        return all(low <= number >> shift & ones <= high for shift, ones, low, high in self.ranges)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a selector belongs: under each of `keys` in the table of `mask`; the same policy under all of them.

    With `interval` the keys alone do not decide, and `bounds` must match too.
    """

    keys: tuple[tuple[int, int], ...]  # (mask, value * MIX)
    interval: Interval | None = None


def place(selector: Selector) -> Placement:
    """The placement with the fewest intervals that stays within MAX_PREFIXES keys."""
    layout = LAYOUT_V4 if selector.version == 4 else LAYOUT_V6
    fixed_mask = fixed_value = 0
    if selector.protocol:
        fixed_mask, fixed_value = layout.protocol.full, selector.protocol
    if selector.mark.mask:
        fixed_mask |= selector.mark.mask << layout.mark.shift
        fixed_value |= selector.mark.value << layout.mark.shift  # a value outside its mask matches nothing, as in Linux
    choices: list[list[tuple[int, int]]] = []
    spans = _spans(selector, layout)
    for field, low, high in spans:
        choices.append(list(_prefixes(field, low, high)))
    count = 1
    for prefixes in choices:
        count *= len(prefixes)
    interval = None
    while count > MAX_PREFIXES:
        # The field that splits worst stays whole; the first one to do so is the one that is searched by.
        worst = max(range(len(choices)), key=lambda i: len(choices[i]))
        if interval is None:
            interval = Interval(*spans[worst])
        count //= len(choices[worst])
        choices[worst] = [(0, 0)]
    keys = []
    for combination in product(*choices):
        mask, value = fixed_mask, fixed_value
        for part_mask, part_value in combination:
            mask |= part_mask
            value |= part_value
        keys.append((mask, value * MIX))
    return Placement(tuple(keys), interval)


def place_anywhere(selector: Selector) -> Placement:
    """A placement under the empty shape: by an interval of the address range that is narrower."""
    layout = LAYOUT_V4 if selector.version == 4 else LAYOUT_V6
    spans = _spans(selector, layout)[:2]
    narrower = min(spans, key=lambda span: span[2] - span[1])
    return Placement(((0, 0),), Interval(*narrower))


def bounds_of(selector: Selector) -> Bounds:
    """Every field that the selector reads."""
    layout = LAYOUT_V4 if selector.version == 4 else LAYOUT_V6
    ranges = [(field.shift, (1 << field.width) - 1, low, high) for field, low, high in _spans(selector, layout) if high - low + 1 < 1 << field.width]
    if selector.protocol:
        ranges.append((layout.protocol.shift, 255, selector.protocol, selector.protocol))
    if selector.mark.mask:
        ranges.append((layout.mark.shift, selector.mark.mask, selector.mark.value, selector.mark.value))
    return Bounds(tuple(ranges))


def identity_of(selector: Selector) -> bytes:
    """Bytes that two selectors share exactly when they are equal."""
    numbers = (
        selector.protocol << 64
        | selector.source_ports.low << 48
        | selector.source_ports.high << 32
        | selector.destination_ports.low << 16
        | selector.destination_ports.high
    )
    extra = b""
    if selector.if_id or selector.mark.value or selector.mark.mask:
        extra = (selector.if_id << 64 | selector.mark.value << 32 | selector.mark.mask).to_bytes(12, "big")
    source, destination = selector.source, selector.destination
    return b"".join((source.first.packed, source.last.packed, destination.first.packed, destination.last.packed, numbers.to_bytes(9, "big"), extra))


def _spans(selector: Selector, layout: Layout) -> list[tuple[Field, int, int]]:
    def addresses(field: Field, span: AddressRange) -> tuple[Field, int, int]:
        return field, int(span.first), int(span.last)

    def ports(field: Field, span: PortRange) -> tuple[Field, int, int]:
        return field, span.low, span.high

    return [
        addresses(layout.source, selector.source),
        addresses(layout.destination, selector.destination),
        ports(layout.source_port, selector.source_ports),
        ports(layout.destination_port, selector.destination_ports),
    ]


def _prefixes(field: Field, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The fewest (mask, value) pairs over flow numbers that cover exactly `low` to `high` of `field`."""
    shift, width = field
    while low <= high:
        # The largest block that begins at `low`, as alignment and the end allow.
        bits = min((low & -low).bit_length() - 1 if low else width, (high - low + 1).bit_length() - 1)
        yield ((1 << width) - (1 << bits)) << shift, low << shift
        low += 1 << bits
