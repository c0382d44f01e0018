"""The typed configuration: what swanctl.conf says, checked, in SI units. Immutable.

Option names are those of swanctl.conf(5); an attribute has the option's name. Times are seconds (float), 0 is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag
from pathlib import Path
from typing import Final

from kernel_shim.model import DEFAULT_COPIES, NO_MARK, Action, HeaderCopies, IPAddress, Mark, Mode, PortRange, TrafficSelector, Unresolved
from vpnd.config.tree import Section
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import Proposal
from vpnd.mpls.model import MplsConfig

ALL_BITS: Final = 0xFFFFFFFF  # the mask of a mark without one


@dataclass(frozen=True, slots=True)
class Unique:
    """`%unique`: an interface id that no other CHILD_SA has, or no other IKE SA; `each_way`, `%unique-dir`: a further one for the other direction."""

    each_way: bool = False
    of_ike_sa: bool = False


@dataclass(frozen=True, slots=True)
class UniqueMark:
    """`%unique`: a mark that no other CHILD_SA has, within `mask`, which has its lowest bits; `each_way` likewise."""

    each_way: bool = False
    mask: int = ALL_BITS


@dataclass(frozen=True, slots=True)
class SameMark:
    """`%same`: the value of `mark_in` or `mark_out`, with this mask."""

    mask: int = ALL_BITS


class StartAction(Flag):
    """What `start_action`, `dpd_action` and `close_action` ask for; the older word `clear` is NONE, `restart` is START."""

    NONE = 0
    TRAP = 1
    START = 2

    @property
    def text(self) -> str:
        """As swanctl.conf writes it."""
        return "|".join(str(one.name).lower() for one in (StartAction.TRAP, StartAction.START) if one in self) or "none"


class UniquePolicy(Enum):
    """What becomes of other IKE SAs between the same two identities (swanctl.conf, `unique`)."""

    NEVER = "never"  # nothing, not even when the peer says that this is its first contact
    NO = "no"  # they go when the peer says so (INITIAL_CONTACT)
    KEEP = "keep"  # they stay, and a new one of another address is refused
    REPLACE = "replace"  # they go when a new one is authenticated


class Childless(Enum):
    """RFC 6023: whether an IKE SA may, or must, come up without a CHILD_SA."""

    ALLOW = "allow"
    PREFER = "prefer"
    FORCE = "force"
    NEVER = "never"


class AuthMethod(Enum):
    PSK = "psk"
    PUBKEY = "pubkey"


class Fragmentation(Enum):
    """IKE fragmentation (RFC 7383). `force` differs from `yes` only in IKEv1."""

    YES = "yes"
    ACCEPT = "accept"  # the peer may, we do not
    FORCE = "force"
    NO = "no"


class RedirectIn(Enum):
    """When a client is sent to another gateway (RFC 5685): at once, or once it is authenticated."""

    INIT = "init"
    AUTH = "auth"


@dataclass(frozen=True, slots=True)
class AuthRound:
    """A `local*` or `remote*` section. `id` None: for local the certificate's subject or the address; for remote any identity."""

    auth: AuthMethod = AuthMethod.PUBKEY
    id: Identity | None = None
    certs: tuple[bytes, ...] = ()  # DER
    cacerts: tuple[bytes, ...] = ()  # DER
    signature_schemes: tuple[str, ...] = ()  # constraints after `auth = pubkey-...` or `ike:...`; empty: any strong one


@dataclass(frozen=True, slots=True)
class TsTemplate:
    """An entry of `local_ts` or `remote_ts`. `addresses` None is `dynamic`: the IKE endpoint's own address, filled in when it is known."""

    addresses: TrafficSelector | None
    protocol: int = 0
    ports: PortRange = field(default_factory=PortRange)


@dataclass(frozen=True, slots=True)
class ChildConfig:
    name: str
    esp_proposals: tuple[Proposal, ...]
    local_ts: tuple[TsTemplate, ...]
    remote_ts: tuple[TsTemplate, ...]
    mode: Mode = Mode.TUNNEL
    start_action: StartAction = StartAction.NONE
    dpd_action: StartAction = StartAction.NONE  # what follows when the peer is found dead
    close_action: StartAction = StartAction.NONE  # what follows when the peer deletes it
    action: Action = Action.PROTECT  # `mode = pass | drop` are BYPASS and DISCARD shunts
    rekey_time: float = 3600.0  # soft lifetime
    life_time: float = 3960.0  # hard lifetime
    rand_time: float = 360.0  # a random part of it is taken off `rekey_time`
    rekey_bytes: int = 0
    life_bytes: int = 0
    rand_bytes: int = 0
    rekey_packets: int = 0
    life_packets: int = 0
    rand_packets: int = 0
    inactivity: float = 0.0  # it is deleted when no packet uses it for so long
    replay_window: int = 32
    priority: int = 0  # 0: by the selector's size
    reqid: int = 0  # 0: given by the manager
    copies: HeaderCopies = DEFAULT_COPIES  # `copy_dscp`, `copy_ecn`, `copy_df`
    tfc_padding: int = 0  # bytes; TFC_TO_MTU is `mtu`
    mark_in: Mark | UniqueMark = NO_MARK  # of policies in and forward, and with `mark_in_sa` of the SA in
    mark_out: Mark | UniqueMark = NO_MARK  # of policies and SA out
    mark_in_sa: bool = False
    set_mark_in: Mark | SameMark = NO_MARK  # what packets that the SA in decrypted are marked with
    set_mark_out: Mark | SameMark = NO_MARK  # what packets that the SA out encrypted are marked with
    if_id_in: int | Unique = 0  # of policies and SAs; 0 is none
    if_id_out: int | Unique = 0
    xfrm_interface: str = ""  # our own option: an XFRM interface of this name and of `if_id_out` that the daemon makes
    xfrm_routes: bool = True  # our own option: whether `remote_ts` is routed into it
    unresolved: Unresolved = Unresolved.QUEUE  # our own option: `unresolved = queue | eagain | block | drop`


@dataclass(frozen=True, slots=True)
class ConnectionConfig:
    name: str
    proposals: tuple[Proposal, ...]
    local: tuple[AuthRound, ...]
    remote: tuple[AuthRound, ...]
    children: Mapping[str, ChildConfig]
    local_addrs: tuple[str, ...] = ("%any",)
    remote_addrs: tuple[str, ...] = ("%any",)
    local_port: int = 500
    remote_port: int = 500
    encap: bool | None = None  # force ESP into UDP; False: only behind a NAT; None (`auto`): as the kernel prefers
    dpd_delay: float = 0.0
    dpd_timeout: float = 0.0
    keyingtries: int = 1  # 0: for ever
    unique: UniquePolicy = UniquePolicy.NO
    rekey_time: float = 14400.0
    reauth_time: float = 0.0
    over_time: float = 1440.0  # the IKE SA is closed this long after `rekey_time`, or `reauth_time` should that come first
    rand_time: float = 1440.0
    fragmentation: Fragmentation = Fragmentation.YES
    follow_nat: bool = True  # our own option: whether a peer behind a NAT that gives it another address or port is followed there
    mobike: bool = True
    redirect: GatewayId | None = None  # our own option: clients that follow are sent there
    redirect_in: RedirectIn = RedirectIn.AUTH
    childless: Childless = Childless.ALLOW
    resumption: bool = False  # our own option: tickets for session resumption (RFC 5723), asked for, given and used
    ppk_id: Identity | None = None  # of a responder it may have a wildcard, and None is any
    ppk_required: bool = False
    send_cert: str = "ifasked"
    send_certreq: bool = True


@dataclass(frozen=True, slots=True)
class PrivateKeySource:
    """A private key as the file or a peer of the control socket gave it; `data` is PEM or DER."""

    data: bytes = field(repr=False)
    passphrase: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SharedSecret:
    """A `secrets.ike*` section: a pre-shared key and the identities that it is for (none: for all); with `ppk` a `secrets.ppk*` section (RFC 8784)."""

    name: str
    data: bytes = field(repr=False)
    owners: tuple[Identity, ...] = ()
    ppk: bool = False


@dataclass(frozen=True, slots=True)
class Configuration:
    connections: Mapping[str, ConnectionConfig] = field(default_factory=dict)
    shared: Mapping[str, SharedSecret] = field(default_factory=dict)
    private_keys: tuple[PrivateKeySource, ...] = ()
    certificates: tuple[bytes, ...] = ()  # DER, end entity
    authorities: tuple[bytes, ...] = ()  # DER, trusted CAs
    mpls: MplsConfig = field(default_factory=MplsConfig)


class KernelChoice(Enum):
    """Which kernel carries the packets."""

    USERSPACE = "userspace"
    XFRM = "xfrm"
    PFKEY = "pfkey"
    AUTO = "auto"  # the first that works and can do all that is asked


class LogFormat(Enum):
    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """The top-level `vpnd` section: the daemon's own settings. Where strongswan.conf(5) has such an option, name and default are its."""

    kernel: KernelChoice = KernelChoice.USERSPACE
    shim_socket: Path = Path("/run/vpnd/shim.sock")
    start_shim: bool = True  # start a shim process when none listens
    control_socket: Path = Path("/run/vpnd/vici.sock")
    control_mode: int = 0o660
    control_owner: str | None = None  # name or number; None: who runs the daemon
    control_group: str | None = None
    listen: tuple[IPAddress, ...] = ()  # IKE addresses; empty: all of the host
    log_level: str = "info"  # debug | info | warning | error
    log_format: LogFormat = LogFormat.CONSOLE
    cookie_threshold: int = 30  # half-open IKE SAs from which on every initiator must return a cookie; 0: never
    cookie_threshold_ip: int = 3  # the same for one address
    block_threshold: int = 5  # half-open IKE SAs of one address that are accepted; 0: any number
    half_open_limit: int = 1000  # half-open IKE SAs in all
    half_open_timeout: float = 30.0
    keep_alive: float = 20.0  # NAT keepalive interval; 0: none
    retransmit_timeout: float = 4.0  # first retransmission
    retransmit_base: float = 1.8  # growth of the interval
    retransmit_tries: int = 12
    retransmit_limit: float = 14.0  # the longest interval; 0: none
    make_before_break: bool = True  # a reauthentication makes the new IKE SA before it deletes the old one
    inactivity_close_ike: bool = False  # an IKE SA whose last CHILD_SA was not used goes with it
    shutdown_timeout: float = 3.0  # for the peers to answer our deletes
    state_dir: Path = Path("/var/lib/vpnd")  # what outlives the daemon
    follow_redirects: bool = True  # as a client, where a gateway sends us
    crash_detection: bool = True  # peers that know RFC 6290 learn at once that we lost our IKE SAs
    fragment_size: int = 1280  # octets of an IP packet that IKE fragments may fill; 0: 576 for IPv4, 1280 for IPv6


@dataclass(frozen=True, slots=True)
class LoadedConfiguration:
    """A configuration file and what it includes. `warnings` are complete lines with their place, `tree` knows the place of each option."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    configuration: Configuration = field(default_factory=Configuration)
    warnings: tuple[str, ...] = ()
    tree: Section = field(default_factory=Section, repr=False)
