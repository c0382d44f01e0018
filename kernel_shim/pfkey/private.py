"""Our own extensions, for what PF_KEY cannot say (docs/pfkey-extensions.md), as values. Only clients that sent X_HELLO see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.inspection import CachedBundle, PendingQueue
from kernel_shim.model import DEFAULT_COPIES, Capabilities, Direction, Flow, HeaderCopies, Selector, TrafficSelector, Unresolved
from kernel_shim.mpls.node import NodeEntry
from kernel_shim.pfkey.constants import PRIVATE_VERSION, ExtensionType
from kernel_shim.pfkey.messages import Extension


@dataclass(frozen=True, slots=True)
class Hello(Extension):
    """In REGISTER: the client asks for these extensions; in the reply: the version that both speak."""

    type: ClassVar[ExtensionType] = ExtensionType.X_HELLO
    version: int = PRIVATE_VERSION


@dataclass(frozen=True, slots=True)
class CapabilitiesExtension(Extension):
    """In the reply to REGISTER. `capabilities.esn` and the like are exact."""

    type: ClassVar[ExtensionType] = ExtensionType.X_CAPABILITIES
    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class SaExtension(Extension):
    """What SA and the lifetimes have no room for."""

    type: ClassVar[ExtensionType] = ExtensionType.X_SA
    direction: Direction
    algorithm: EspAlgorithm
    esn: bool = False
    replay_window: int = 0
    soft_packets: int = 0
    hard_packets: int = 0
    copies: HeaderCopies = DEFAULT_COPIES
    tfc_padding: int = 0


@dataclass(frozen=True, slots=True)
class AcquireReference(Extension):
    """In GETSPI, ADD and UPDATE: the ACQUIRE that they answer, which frees sadb_msg_seq for matching replies."""

    type: ClassVar[ExtensionType] = ExtensionType.X_ACQUIRE
    sequence: int


@dataclass(frozen=True, slots=True)
class SaStatusExtension(Extension):
    """An SA's use. Times in microseconds of the Unix epoch; `used` 0 is never."""

    type: ClassVar[ExtensionType] = ExtensionType.X_SA_STATUS
    sequence: int = 0
    packets: int = 0
    added: int = 0
    used: int = 0


@dataclass(frozen=True, slots=True)
class SaSelectors(Extension):
    """X_SA_SOURCES and X_SA_DESTINATIONS: the SA's own traffic selectors, in its direction."""

    type: ExtensionType
    selectors: tuple[TrafficSelector, ...]


@dataclass(frozen=True, slots=True)
class SelectorExtension(Extension):
    """A policy's selector in full; it overrules the address extensions."""

    type: ClassVar[ExtensionType] = ExtensionType.X_SELECTOR
    selector: Selector


@dataclass(frozen=True, slots=True)
class UnresolvedExtension(Extension):
    """How packets meet the policy while it has no SA."""

    type: ClassVar[ExtensionType] = ExtensionType.X_UNRESOLVED
    mode: Unresolved


@dataclass(frozen=True, slots=True)
class FlowExtension(Extension):
    """The packet that an ACQUIRE is for."""

    type: ClassVar[ExtensionType] = ExtensionType.X_FLOW
    flow: Flow


@dataclass(frozen=True, slots=True)
class Statistics(Extension):
    """Counters by name."""

    type: ClassVar[ExtensionType] = ExtensionType.X_STATISTICS
    counters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class DumpPosition(Extension):
    """In every message of a dump: the sequence of the request that it answers, how many messages follow this one, and how many there are (0: not said)."""

    type: ClassVar[ExtensionType] = ExtensionType.X_DUMP
    request: int
    remaining: int
    total: int = 0


@dataclass(frozen=True, slots=True)
class ErrorText(Extension):
    """What an errno leaves unsaid, for a log."""

    type: ClassVar[ExtensionType] = ExtensionType.X_ERROR
    text: str


@dataclass(frozen=True, slots=True)
class PendingExtension(Extension):
    """One queue of packets that wait for an SA."""

    type: ClassVar[ExtensionType] = ExtensionType.X_PENDING
    queue: PendingQueue


@dataclass(frozen=True, slots=True)
class BundleExtension(Extension):
    """One entry of the bundle cache."""

    type: ClassVar[ExtensionType] = ExtensionType.X_BUNDLE
    bundle: CachedBundle


@dataclass(frozen=True, slots=True)
class LabelEntries(Extension):
    """Entries of the label node: those to put or to delete (by their keys), or those that are there."""

    type: ClassVar[ExtensionType] = ExtensionType.X_LABELS
    entries: tuple[NodeEntry, ...]


@dataclass(frozen=True, slots=True)
class Lost(Extension):
    """In X_OVERRUN to a promiscuous client: how many messages it was not sent, just here."""

    type: ClassVar[ExtensionType] = ExtensionType.X_LOST
    messages: int
