"""What a kernel has, held against what it should have. Pure: the tables come in, the difference goes out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from kernel_shim.model import Policy, SaId, SaState, SaStatus
from vpnd.policies import PolicyKey


@dataclass(frozen=True, slots=True)
class PolicyDrift:
    """`missing` are wanted and not there, or otherwise; `foreign` are there and nobody wants them."""

    missing: frozenset[PolicyKey]
    foreign: frozenset[PolicyKey]


def policy_drift(standing: Mapping[PolicyKey, Policy], desired: Iterable[Policy], pending: Collection[PolicyKey]) -> PolicyDrift:
    """`pending` are changes that are under way: no drift."""
    wanted = {(policy.direction, policy.selector): policy for policy in desired}
    return PolicyDrift(
        frozenset(key for key, policy in wanted.items() if key not in pending and not (key in standing and same_policy(standing[key], policy))),
        frozenset(key for key in standing if key not in pending and key not in wanted),
    )


def same_policy(one: Policy, other: Policy) -> bool:
    """Whether two policies of one direction and selector ask for the same."""
    return (one.action, one.priority, one.templates, one.unresolved) == (other.action, other.priority, other.templates, other.unresolved)


class Strangers:
    """SAs that nobody owns. One that is met for the first time may be about to get its owner: it has `grace` seconds."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._since: dict[SaId, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def meet(self, actual: Mapping[SaId, SaStatus], known: Collection[SaId], now: float) -> list[SaId]:
        """Those whose grace is over. Larval SAs expire by themselves."""
        met = [sa for sa, status in actual.items() if sa not in known and status.state is not SaState.LARVAL]
        self._since = {sa: self._since.get(sa, now) for sa in met}
        return [sa for sa, since in self._since.items() if now >= since + self._grace]
