"""Policies, the entries of the SPD: for which packets, what happens to them, and what SAs that takes (RFC 4301 section 4.4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NewType

from kernel_shim.model.addresses import IPAddress
from kernel_shim.model.numbers import PROTOCOL_ESP
from kernel_shim.model.security_labels import SecurityContext
from kernel_shim.model.selectors import Selector

ReqId = NewType("ReqId", int)
PolicyIndex = NewType("PolicyIndex", int)


class Direction(IntEnum):
    """The numbers are `IPSEC_DIR_*` of PF_KEY (linux/ipsec.h)."""

    IN = 1
    OUT = 2
    FORWARD = 3


class Mode(IntEnum):
    """The numbers are `IPSEC_MODE_*` of PF_KEY (linux/ipsec.h)."""

    TRANSPORT = 1
    TUNNEL = 2


class Action(IntEnum):
    """The numbers are `IPSEC_POLICY_*` of PF_KEY (linux/ipsec.h)."""

    DISCARD = 0
    BYPASS = 1
    PROTECT = 2


class Level(IntEnum):
    """How strictly a template asks for an SA; `IPSEC_LEVEL_*` of PF_KEY."""

    DEFAULT = 0
    USE = 1
    REQUIRE = 2
    UNIQUE = 3


class Unresolved(Enum):
    """What happens to a packet whose policy has no SA yet."""

    QUEUE = "queue"
    EAGAIN = "eagain"
    BLOCK = "block"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Template:
    """The SA that a policy asks for. `source` and `destination` are the outer addresses; None is any."""

    mode: Mode
    reqid: ReqId
    source: IPAddress | None = None
    destination: IPAddress | None = None
    protocol: int = PROTOCOL_ESP
    level: Level = Level.UNIQUE


@dataclass(frozen=True, slots=True)
class Policy:
    """An entry of the SPD. A lower `priority` wins, as in Linux; of two equal ones the older. `index` is the kernel's, 0 before it gave one.

    After `soft_seconds` the kernel says so, after `hard_seconds` the policy is gone; both count from when it was put there, 0 is never.
    """

    selector: Selector
    direction: Direction
    action: Action
    priority: int = 0
    templates: tuple[Template, ...] = ()
    unresolved: Unresolved = Unresolved.QUEUE
    index: PolicyIndex = PolicyIndex(0)
    soft_seconds: int = 0
    hard_seconds: int = 0
    context: SecurityContext | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A tunnel whose outer addresses change. `reqid` 0 is any."""

    mode: Mode
    reqid: ReqId
    old_source: IPAddress
    old_destination: IPAddress
    new_source: IPAddress
    new_destination: IPAddress


@dataclass(frozen=True, slots=True)
class Migration:
    """A policy, its templates and the SAs behind them go to other outer addresses (SADB_X_MIGRATE)."""

    direction: Direction
    selector: Selector
    moves: tuple[Move, ...]
