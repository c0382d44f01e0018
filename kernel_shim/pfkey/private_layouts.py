"""How our own extensions look on the wire (docs/pfkey-extensions.md): a reader and its writer side by side, then the table.

Integers are in host byte order, addresses in network byte order, as in the rest of PF_KEY.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from struct import Struct
from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import (
    Capabilities,
    Direction,
    Flow,
    HeaderCopies,
    Mark,
    Mode,
    Selector,
    TrafficSelector,
)
from kernel_shim.pfkey.constants import (
    MAX_ALGORITHMS,
    MAX_ERROR_TEXT,
    MAX_SELECTORS,
    NUMBER_OF_UNRESOLVED,
    UNRESOLVED_OF_NUMBER,
    ExtensionType,
)
from kernel_shim.pfkey.inspection_layouts import read_bundle, read_pending, read_statistics, write_bundle, write_pending, write_statistics
from kernel_shim.pfkey.label_layouts import read_labels, write_labels
from kernel_shim.pfkey.layouts import Layout
from kernel_shim.pfkey.messages import PfKeyError
from kernel_shim.pfkey.private import (
    AcquireReference,
    CapabilitiesExtension,
    DumpPosition,
    ErrorText,
    FlowExtension,
    Hello,
    Lost,
    SaExtension,
    SaSelectors,
    SaStatusExtension,
    SelectorExtension,
    UnresolvedExtension,
)
from kernel_shim.pfkey.wire import Reader, Writer

_ENCRYPTIONS: Final = {int(encryption): encryption for encryption in EncryptionId}
_INTEGRITIES: Final = {int(integrity): integrity for integrity in IntegrityId}
_ENCAPSULATION, _ESN, _PORT_RANGES, _ADDRESS_RANGES, _SA_SELECTORS, _ACQUIRE_FLOW, _BINDS, _PREFERS_UDP, _TFC, _LABELS = (1 << bit for bit in range(10))
_SA_ESN, _SA_NO_DSCP_OUT, _SA_DSCP_IN, _SA_NO_ECN, _SA_NO_DF = (1 << bit for bit in range(5))
_TWO_SHORTS: Final = Struct("=HH")
_COUNT: Final = Struct("=I")


def read_hello(reader: Reader, _: ExtensionType) -> Hello:
    return Hello(reader.take(_TWO_SHORTS)[0])


def write_hello(writer: Writer, hello: Hello) -> None:
    writer.put(_TWO_SHORTS, hello.version, 0)


_CAPABILITIES: Final = Struct("=IIBBBxIxxxx")
_ALGORITHM: Final = Struct("=HHHH")


def read_capabilities(reader: Reader, _kind: ExtensionType) -> CapabilitiesExtension:
    flags, window, modes, unresolved, name_length, count = reader.take(_CAPABILITIES)
    if count > MAX_ALGORITHMS:
        raise reader.fail(f"{count} algorithms")
    algorithms = set()
    for _ in range(count):
        encryption, key_bits, integrity, _icv = reader.take(_ALGORITHM)
        # One that this side has no name for cannot be asked for either.
        if encryption in _ENCRYPTIONS and integrity in _INTEGRITIES:
            algorithms.add(EspAlgorithm(_ENCRYPTIONS[encryption], key_bits, _INTEGRITIES[integrity]))
    name = reader.text(name_length)
    reader.pad()
    return CapabilitiesExtension(
        Capabilities(
            name=name,
            algorithms=frozenset(algorithms),
            modes=frozenset(mode for mode in Mode if modes >> mode & 1),
            encapsulation_required=bool(flags & _ENCAPSULATION),
            encapsulation_preferred=bool(flags & _PREFERS_UDP),
            tfc_padding=bool(flags & _TFC),
            labels=bool(flags & _LABELS),
            esn=bool(flags & _ESN),
            maximum_replay_window=window,
            port_ranges=bool(flags & _PORT_RANGES),
            address_ranges=bool(flags & _ADDRESS_RANGES),
            sa_selectors=bool(flags & _SA_SELECTORS),
            acquire_flow=bool(flags & _ACQUIRE_FLOW),
            unresolved_modes=frozenset(mode for mode, bit in NUMBER_OF_UNRESOLVED.items() if unresolved >> bit & 1),
            binds_ike_sockets=bool(flags & _BINDS),
        )
    )


def write_capabilities(writer: Writer, extension: CapabilitiesExtension) -> None:
    it = extension.capabilities
    flags = (
        it.encapsulation_required * _ENCAPSULATION
        | it.encapsulation_preferred * _PREFERS_UDP
        | it.tfc_padding * _TFC
        | it.labels * _LABELS
        | it.esn * _ESN
        | it.port_ranges * _PORT_RANGES
        | it.address_ranges * _ADDRESS_RANGES
        | it.sa_selectors * _SA_SELECTORS
        | it.acquire_flow * _ACQUIRE_FLOW
        | it.binds_ike_sockets * _BINDS
    )
    name = it.name.encode()
    modes, unresolved = sum(1 << mode for mode in it.modes), sum(1 << NUMBER_OF_UNRESOLVED[mode] for mode in it.unresolved_modes)
    writer.put(_CAPABILITIES, flags, it.maximum_replay_window, modes, unresolved, len(name), len(it.algorithms))
    for algorithm in sorted(it.algorithms, key=lambda a: (a.encryption, a.key_bits, a.integrity)):
        writer.put(_ALGORITHM, algorithm.encryption, algorithm.key_bits, algorithm.integrity, algorithm.icv_length)
    writer.octets(name)
    writer.pad()


_SA: Final = Struct("=BBxxHHHHIIQQ")


def read_sa(reader: Reader, _: ExtensionType) -> SaExtension:
    direction, flags, encryption, key_bits, integrity, icv, window, padding, soft, hard = reader.take(_SA)
    if direction not in (Direction.IN, Direction.OUT):
        raise reader.fail(f"{direction}", "direction")
    if encryption not in _ENCRYPTIONS or integrity not in _INTEGRITIES:
        raise PfKeyError("X_SA.algorithm", f"encryption {encryption} with integrity {integrity} is not known", errno.ENOSYS)
    algorithm = EspAlgorithm(_ENCRYPTIONS[encryption], key_bits, _INTEGRITIES[integrity])
    if icv != algorithm.icv_length:
        raise reader.fail(f"{icv} octets, {algorithm.icv_length} expected", "icv")
    copies = HeaderCopies(not flags & _SA_NO_DSCP_OUT, bool(flags & _SA_DSCP_IN), not flags & _SA_NO_ECN, not flags & _SA_NO_DF)
    return SaExtension(Direction(direction), algorithm, bool(flags & _SA_ESN), window, soft, hard, copies, padding)


def write_sa(writer: Writer, sa: SaExtension) -> None:
    it, copies = sa.algorithm, sa.copies
    flags = sa.esn * _SA_ESN | (not copies.dscp_out) * _SA_NO_DSCP_OUT | copies.dscp_in * _SA_DSCP_IN | (not copies.ecn) * _SA_NO_ECN
    flags |= (not copies.df) * _SA_NO_DF
    writer.put(
        _SA,
        *(sa.direction, flags, it.encryption, it.key_bits, it.integrity, it.icv_length),
        *(sa.replay_window, sa.tfc_padding, sa.soft_packets, sa.hard_packets),
    )


def read_acquire(reader: Reader, _: ExtensionType) -> AcquireReference:
    return AcquireReference(*reader.take(_COUNT))


def write_acquire(writer: Writer, acquire: AcquireReference) -> None:
    writer.put(_COUNT, acquire.sequence)


_SA_STATUS: Final = Struct("=xxxxQQQQ")


def read_sa_status(reader: Reader, _: ExtensionType) -> SaStatusExtension:
    return SaStatusExtension(*reader.take(_SA_STATUS))


def write_sa_status(writer: Writer, status: SaStatusExtension) -> None:
    writer.put(_SA_STATUS, status.sequence, status.packets, status.added, status.used)


_TRAFFIC_SELECTOR: Final = Struct("=BBHHxx")


def read_sa_selectors(reader: Reader, kind: ExtensionType) -> SaSelectors:
    count, _ = reader.take(_TWO_SHORTS)
    if count > MAX_SELECTORS:
        raise reader.fail(f"{count} selectors")
    selectors = []
    for _ in range(count):
        version, protocol, low, high = reader.take(_TRAFFIC_SELECTOR)
        ports = reader.port_range(low, high)
        selectors.append(TrafficSelector(reader.address_range(reader.version(version)), protocol, ports))
    return SaSelectors(kind, tuple(selectors))


def write_sa_selectors(writer: Writer, side: SaSelectors) -> None:
    if len(side.selectors) > MAX_SELECTORS:
        raise PfKeyError(side.type.name, f"{len(side.selectors)} selectors")
    writer.put(_TWO_SHORTS, len(side.selectors), 0)
    for selector in side.selectors:
        writer.put(_TRAFFIC_SELECTOR, selector.addresses.version, selector.protocol, selector.ports.low, selector.ports.high)
        writer.address_range(selector.addresses)


_SELECTOR: Final = Struct("=BBxxHHHHIIIxxxx")


def read_selector(reader: Reader, _: ExtensionType) -> SelectorExtension:
    number, protocol, source_low, source_high, destination_low, destination_high, if_id, mark, mask = reader.take(_SELECTOR)
    source_ports = reader.port_range(source_low, source_high)
    destination_ports = reader.port_range(destination_low, destination_high)
    version = reader.version(number)
    source, destination = reader.address_range(version), reader.address_range(version)
    return SelectorExtension(Selector(source, destination, protocol, source_ports, destination_ports, if_id, Mark(mark, mask)))


def write_selector(writer: Writer, extension: SelectorExtension) -> None:
    it = extension.selector
    writer.put(
        _SELECTOR,
        *(it.version, it.protocol, it.source_ports.low, it.source_ports.high, it.destination_ports.low, it.destination_ports.high),
        *(it.if_id, it.mark.value, it.mark.mask),
    )
    writer.address_range(it.source)
    writer.address_range(it.destination)


def read_unresolved(reader: Reader, _: ExtensionType) -> UnresolvedExtension:
    number, _ = reader.take(_TWO_SHORTS)
    if number not in UNRESOLVED_OF_NUMBER:
        raise reader.fail(f"{number}", "mode")
    return UnresolvedExtension(UNRESOLVED_OF_NUMBER[number])


def write_unresolved(writer: Writer, extension: UnresolvedExtension) -> None:
    writer.put(_TWO_SHORTS, NUMBER_OF_UNRESOLVED[extension.mode], 0)


_FLOW: Final = Struct("=BBxxHHxxxx")


def read_flow(reader: Reader, _: ExtensionType) -> FlowExtension:
    number, protocol, source_port, destination_port = reader.take(_FLOW)
    version = reader.version(number)
    return FlowExtension(Flow(reader.address(version), reader.address(version), protocol, source_port, destination_port))


def write_flow(writer: Writer, extension: FlowExtension) -> None:
    flow = extension.flow
    writer.put(_FLOW, flow.source.version, flow.protocol, flow.source_port, flow.destination_port)
    writer.address(flow.source)
    writer.address(flow.destination)


_DUMP: Final = Struct("=III")


def read_dump(reader: Reader, _: ExtensionType) -> DumpPosition:
    return DumpPosition(*reader.take(_DUMP))


def write_dump(writer: Writer, position: DumpPosition) -> None:
    writer.put(_DUMP, position.request, position.remaining, position.total)


def read_error(reader: Reader, _: ExtensionType) -> ErrorText:
    length, _ = reader.take(_TWO_SHORTS)
    if length > MAX_ERROR_TEXT:
        raise reader.fail(f"text of {length} octets")
    text = reader.text(length)
    reader.pad()
    return ErrorText(text)


def write_error(writer: Writer, error: ErrorText) -> None:
    text = error.text.encode()
    writer.put(_TWO_SHORTS, len(text), 0)
    writer.octets(text)
    writer.pad()


def read_lost(reader: Reader, _: ExtensionType) -> Lost:
    return Lost(*reader.take(_COUNT))


def write_lost(writer: Writer, lost: Lost) -> None:
    writer.put(_COUNT, lost.messages)


PRIVATE_LAYOUTS: Final[Mapping[ExtensionType, Layout]] = {
    ExtensionType.X_HELLO: Layout(read_hello, write_hello),
    ExtensionType.X_CAPABILITIES: Layout(read_capabilities, write_capabilities),
    ExtensionType.X_SA: Layout(read_sa, write_sa),
    ExtensionType.X_SA_STATUS: Layout(read_sa_status, write_sa_status),
    ExtensionType.X_SA_SOURCES: Layout(read_sa_selectors, write_sa_selectors),
    ExtensionType.X_SA_DESTINATIONS: Layout(read_sa_selectors, write_sa_selectors),
    ExtensionType.X_SELECTOR: Layout(read_selector, write_selector),
    ExtensionType.X_UNRESOLVED: Layout(read_unresolved, write_unresolved),
    ExtensionType.X_FLOW: Layout(read_flow, write_flow),
    ExtensionType.X_STATISTICS: Layout(read_statistics, write_statistics),
    ExtensionType.X_DUMP: Layout(read_dump, write_dump),
    ExtensionType.X_ACQUIRE: Layout(read_acquire, write_acquire),
    ExtensionType.X_ERROR: Layout(read_error, write_error),
    ExtensionType.X_PENDING: Layout(read_pending, write_pending),
    ExtensionType.X_BUNDLE: Layout(read_bundle, write_bundle),
    ExtensionType.X_LOST: Layout(read_lost, write_lost),
    ExtensionType.X_LABELS: Layout(read_labels, write_labels),
}
