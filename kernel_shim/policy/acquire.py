"""Asking the key manager for SAs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from kernel_shim.model import Acquire, AcquireSequence, Flow, Policy, PolicyIndex, Template
from kernel_shim.policy.peer import PeerKey

ACQUIRE_SECONDS: Final = 165.0
REPEAT_SECONDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
BACKOFF_SECONDS: Final = (1.0, 2.0, 5.0, 10.0, 30.0)
MAX_ACQUIRES: Final = 65536


class Need(Enum):
    """What became of a wish for an SA."""

    ASKED = "asked"  # `acquires` in the next `take` holds it
    WAITING = "waiting"  # one is under way
    BACKING_OFF = "backing_off"  # the last one failed: the packet is not worth keeping
    TABLE_FULL = "table_full"


@dataclass(frozen=True, slots=True)
class Due:
    """What time brought: ACQUIREs to send (new or repeated), peers that timed out, peers that may be asked for again."""

    acquires: tuple[Acquire, ...] = ()
    timed_out: tuple[PeerKey, ...] = ()
    retry: tuple[PeerKey, ...] = ()


class AcquireTable:
    """One ACQUIRE at a time for each policy and peer."""

    def need(self, key: PeerKey, policy: Policy, template: Template, flow: Flow, now: float) -> tuple[Need, Acquire | None]:
        """A packet of `flow` has no SA. The Acquire, if any, is to be sent now; when over the rate it is sent by `poll` later."""
        raise NotImplementedError

    def peer(self, sequence: AcquireSequence) -> tuple[PeerKey, Flow] | None:
        """Whom an outstanding ACQUIRE is for, and the flow that caused it."""
        raise NotImplementedError

    def satisfied(self, sequence: AcquireSequence, *, covered: bool, now: float) -> PeerKey | None:
        """An outbound SA came for it; `covered` says whether its selectors cover the flow of the ACQUIRE. None: not outstanding."""
        raise NotImplementedError

    def resolved(self, key: PeerKey) -> None:
        """The peer has SAs now, whoever made them: forget the ACQUIRE."""
        raise NotImplementedError

    def failed(self, sequence: AcquireSequence, now: float) -> PeerKey | None:
        """The key manager gave up: back off. Discard the queue of the peer that is given back. None: not outstanding."""
        raise NotImplementedError

    def forget_policy(self, policy: PolicyIndex) -> list[PeerKey]:
        """The policy is gone, and with it what was asked for it."""
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def listening(self, listening: bool, now: float) -> None:
        """Whether a key manager listens. When one comes, everything outstanding is due at once in `poll`."""
        raise NotImplementedError

    def poll(self, now: float) -> Due:
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When `poll` next has something to do; monotonic seconds."""
        raise NotImplementedError

    def outstanding(self) -> list[Acquire]:
        """A snapshot, oldest first."""
        raise NotImplementedError

    def statistics(self) -> dict[str, int]:
        raise NotImplementedError
