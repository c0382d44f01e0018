"""The `mpls` section of the configuration: what it says, checked, immutable. Option names are the attributes' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address
from typing import Final, NewType

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import LAST_LABEL, Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import TtlModel

RouteTarget = NewType("RouteTarget", str)
"""As written, `65000:1` (RFC 4360 section 4); a VRF without any has the one that `own_target` gives it."""


def own_target(vrf: str) -> RouteTarget:
    """The target of VRFs that name none: those of one name then belong together. No written target looks like it."""
    return RouteTarget(f"vrf {vrf}")


class LabelMode(Enum):
    """How many labels a VRF has."""

    PER_VRF = "per-vrf"
    PER_PREFIX = "per-prefix"


@dataclass(frozen=True, slots=True)
class VrfConfig:
    """A customer's network at this node. `prefixes` are those of its own sites here; empty: whatever `table` knows."""

    name: str
    interface: str
    table: int = 0
    members: tuple[str, ...] = ()
    prefixes: tuple[IPNetwork, ...] = ()
    labels: LabelMode = LabelMode.PER_VRF
    label: Label | None = None  # None: given from `label_range`
    ttl: TtlModel = TtlModel.PIPE
    rd: str = ""  # a route distinguisher, for a routing protocol; nothing here reads it
    imports: frozenset[RouteTarget] = frozenset()  # `import`
    exports: frozenset[RouteTarget] = frozenset()  # `export`


@dataclass(frozen=True, slots=True)
class RemoteVrf:
    """A VRF at a peer: its prefixes go there under `label`."""

    name: str
    prefixes: tuple[IPNetwork, ...]
    label: Label
    imports: frozenset[RouteTarget] = frozenset()
    exports: frozenset[RouteTarget] = frozenset()


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """A neighbour with a tunnel, or one that lies behind the neighbour `via` under the labels `push`, outermost first.

    `accept` None: the labels of those VRFs here that export to one of the peer's, and of LSPs that come from it.
    `own_space`: labels that it sends are looked up in a space of its own. `next_hops`: what a routing protocol calls it besides `remote`.
    """

    name: str
    local: IPAddress | None = None
    remote: IPAddress | None = None
    encapsulation: Encapsulation = Encapsulation.GRE
    managed: bool = False
    via: str = ""
    push: tuple[Label, ...] = ()
    accept: LabelSet | None = None
    own_space: bool = False
    ttl: TtlModel = TtlModel.PIPE
    entropy: bool = False
    traffic_class: int | None = None
    vrfs: Mapping[str, RemoteVrf] = field(default_factory=dict)
    next_hops: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class LspConfig:
    """A label that goes on: swapped for `push`, or taken off when that is empty. `sources`: whose it is; empty: nobody's but by `accept`.

    Several peers in `to`: equal cost. Without `to` its packets come to light in `vrf`.
    """

    name: str
    label: Label
    sources: tuple[str, ...] = ()  # `from`
    to: tuple[str, ...] = ()
    push: tuple[Label, ...] = ()
    vrf: str = ""
    ttl: TtlModel = TtlModel.UNIFORM
    traffic_class: int | None = None
    entropy: bool = False


DEFAULT_RANGE: Final = LabelSet([LabelRange(Label(1 << 19), LAST_LABEL)])  # the upper half: hand-chosen labels tend to be small


FPM_ADDRESS: Final = IPv4Address("127.0.0.1")
FPM_PORT: Final = 2620  # FRR: fpm/fpm.h
FPM_USERS: Final = ("frr",)  # zebra's in FRR's own and in Debian's packages


@dataclass(frozen=True, slots=True)
class FpmConfig:
    """Where a routing daemon connects to say its routes. `fpm` gives address and port, `fpm_settle` and `fpm_grace` the seconds after
    which what it did not say again goes: since it fell silent, and since its connection began or ended. `fpm_users`: who may connect from this host.
    """

    address: IPAddress = FPM_ADDRESS
    port: int = FPM_PORT
    settle: float = 30.0
    grace: float = 300.0
    users: tuple[str, ...] = FPM_USERS


@dataclass(frozen=True, slots=True)
class MplsConfig:
    """All of it. `dscp_to_tc` and `tc_to_dscp` say what differs from the class selectors (RFC 2474 section 4.2.2)."""

    vrfs: Mapping[str, VrfConfig] = field(default_factory=dict)
    peers: Mapping[str, PeerConfig] = field(default_factory=dict)
    lsps: Mapping[str, LspConfig] = field(default_factory=dict)
    label_range: LabelSet = DEFAULT_RANGE
    dscp_to_tc: Mapping[int, int] = field(default_factory=dict)
    tc_to_dscp: Mapping[int, int] = field(default_factory=dict)
    fpm: FpmConfig | None = None

    def __bool__(self) -> bool:
        """Whether anything is to be forwarded."""
        return bool(self.vrfs or self.peers or self.lsps or self.fpm)
