"""How what people look at travels: queues of waiting packets, the bundle cache, counters (docs/pfkey-extensions.md). Byte order as in `private_layouts`."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Final

from kernel_shim.inspection import CachedBundle, PendingQueue
from kernel_shim.model import AcquireSequence, Action, IPAddress, PolicyIndex, SaId, Spi
from kernel_shim.pfkey.constants import MAX_STATISTIC_NAME, MAX_STATISTICS, NUMBER_OF_UNRESOLVED, UNRESOLVED_OF_NUMBER, ExtensionType
from kernel_shim.pfkey.private import BundleExtension, PendingExtension, Statistics
from kernel_shim.pfkey.wire import Reader, Writer

_NO_ADDRESS: Final[Mapping[int, IPAddress]] = {4: IPv4Address(0), 6: IPv6Address(0)}
_COUNT: Final = Struct("=I")
_COUNTER: Final = Struct("=QH")


def read_statistics(reader: Reader, _kind: ExtensionType) -> Statistics:
    (count,) = reader.take(_COUNT)
    if count > MAX_STATISTICS:
        raise reader.fail(f"{count} counters")
    counters = []
    for _ in range(count):
        value, length = reader.take(_COUNTER)
        if length > MAX_STATISTIC_NAME:
            raise reader.fail(f"name of {length} octets")
        counters.append((reader.text(length), value))
        reader.octets(-(_COUNTER.size + length) % 8)
    return Statistics(tuple(counters))


def write_statistics(writer: Writer, statistics: Statistics) -> None:
    writer.put(_COUNT, len(statistics.counters))
    for name, value in statistics.counters:
        encoded = name.encode()
        writer.put(_COUNTER, value, len(encoded))
        writer.octets(encoded)
        writer.pad()


_PENDING: Final = Struct("=BBBxIIIIIxxxxQ")
_HAS_SOURCE, _HAS_DESTINATION = 1, 2


def read_pending(reader: Reader, _: ExtensionType) -> PendingExtension:
    number, mode, known, policy, acquire, flows, packets, segments, octets = reader.take(_PENDING)
    if mode not in UNRESOLVED_OF_NUMBER:
        raise reader.fail(f"{mode}", "mode")
    version = reader.version(number)
    source, destination = reader.address(version), reader.address(version)
    return PendingExtension(
        PendingQueue(
            PolicyIndex(policy),
            source if known & _HAS_SOURCE else None,
            destination if known & _HAS_DESTINATION else None,
            UNRESOLVED_OF_NUMBER[mode],
            AcquireSequence(acquire),
            *(flows, packets, segments, octets),
        )
    )


def write_pending(writer: Writer, extension: PendingExtension) -> None:
    it = extension.queue
    known = (it.source is not None) * _HAS_SOURCE | (it.destination is not None) * _HAS_DESTINATION
    version = (it.source or it.destination or _NO_ADDRESS[4]).version
    writer.put(_PENDING, version, NUMBER_OF_UNRESOLVED[it.mode], known, it.policy, it.acquire, it.flows, it.packets, it.segments, it.octets)
    writer.address(it.source or _NO_ADDRESS[version])
    writer.address(it.destination or _NO_ADDRESS[version])


_BUNDLE: Final = Struct("=BBBBHHIIIBBBBxxxx")
_LABEL: Final = Struct("=I")
_HAS_PROTOCOL, _HAS_SOURCE_PORT, _HAS_DESTINATION_PORT = 4, 8, 16
_ACTIONS: Final = {int(action): action for action in Action}


def read_bundle(reader: Reader, _: ExtensionType) -> BundleExtension:
    number, known, action, protocol, source_port, destination_port, policy, limit, spi, outer, vrf, peer, labels = reader.take(_BUNDLE)
    if action not in _ACTIONS:
        raise reader.fail(f"{action}", "action")
    version = reader.version(number)
    source, destination = reader.address(version), reader.address(version)
    sa = SaId(reader.address(reader.version(outer)), Spi(spi)) if outer else None
    stack = tuple(int(reader.take(_LABEL)[0]) for _ in range(labels))
    names = reader.text(vrf), reader.text(peer)
    reader.pad()
    return BundleExtension(
        CachedBundle(
            version,
            source if known & _HAS_SOURCE else None,
            destination if known & _HAS_DESTINATION else None,
            protocol if known & _HAS_PROTOCOL else None,
            source_port if known & _HAS_SOURCE_PORT else None,
            destination_port if known & _HAS_DESTINATION_PORT else None,
            _ACTIONS[action],
            PolicyIndex(policy),
            sa,
            limit,
            *names,
            stack,
        )
    )


def write_bundle(writer: Writer, extension: BundleExtension) -> None:
    it = extension.bundle
    fields = (
        (it.source, _HAS_SOURCE),
        (it.destination, _HAS_DESTINATION),
        (it.protocol, _HAS_PROTOCOL),
        (it.source_port, _HAS_SOURCE_PORT),
        (it.destination_port, _HAS_DESTINATION_PORT),
    )
    writer.put(
        _BUNDLE,
        *(it.version, sum(bit for value, bit in fields if value is not None), it.action),
        *(it.protocol or 0, it.source_port or 0, it.destination_port or 0, it.policy, it.limit),
        *((it.sa.spi, it.sa.destination.version) if it.sa is not None else (0, 0)),
        *(len(it.vrf.encode()), len(it.peer.encode()), len(it.labels)),
    )
    writer.address(it.source or _NO_ADDRESS[it.version])
    writer.address(it.destination or _NO_ADDRESS[it.version])
    if it.sa is not None:
        writer.address(it.sa.destination)
    for label in it.labels:
        writer.put(_LABEL, label)
    writer.octets(it.vrf.encode())
    writer.octets(it.peer.encode())
    writer.pad()
