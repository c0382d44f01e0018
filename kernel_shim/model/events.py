"""What a kernel reports of its own accord."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_shim.model.addresses import Endpoint, IPAddress
from kernel_shim.model.associations import AcquireSequence, SaId
from kernel_shim.model.policies import Mode, Policy, PolicyIndex, ReqId
from kernel_shim.model.selectors import Flow, Selector


@dataclass(frozen=True, slots=True)
class Acquire:
    """A packet needs an SA that does not exist. `flow` is None on kernels that cannot say it."""

    sequence: AcquireSequence
    policy: PolicyIndex
    reqid: ReqId
    mode: Mode
    source: IPAddress | None
    destination: IPAddress | None
    selector: Selector | None = None
    flow: Flow | None = None


@dataclass(frozen=True, slots=True)
class Expire:
    """An SA reached a lifetime. After a hard one it is gone."""

    sa: SaId
    reqid: ReqId
    hard: bool


@dataclass(frozen=True, slots=True)
class NewMapping:
    """An authenticated ESP packet of an inbound SA came from another UDP address than before (RFC 3948 section 4)."""

    sa: SaId
    reqid: ReqId
    old: Endpoint
    new: Endpoint


@dataclass(frozen=True, slots=True)
class PolicyExpire:
    """A policy reached a lifetime. After a hard one it is gone."""

    policy: Policy
    hard: bool


KernelEvent = Acquire | Expire | NewMapping | PolicyExpire
