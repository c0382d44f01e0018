"""The security policy database."""

from __future__ import annotations

from kernel_shim.model import Direction, Flow, Policy, PolicyIndex, ReqId, Selector
from kernel_shim.policy.bundle import Generations
from kernel_shim.policy.flowkey import FieldMask
from kernel_shim.reasons import DropReason


def direction_of(index: PolicyIndex) -> Direction:
    """The direction that an index carries in its low three bits. ValueError when it carries none."""
    return Direction((index & 7) + 1)


class SecurityPolicyDatabase:
    """Policies of the three directions, found in one probe for each shape of selector."""

    def __init__(self, generations: Generations | None = None) -> None:
        self.generations = generations if generations is not None else Generations()
        self.probes = 0
        self.lookups = 0

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def generation(self) -> int:
        """Differs after every change."""
        return self.generations.spd

    def fields_read(self, direction: Direction) -> FieldMask:
        """The fields of a packet that any policy of this direction reads."""
        raise NotImplementedError

    def add(self, policy: Policy) -> Policy:
        """The policy with its index. KernelError(EEXIST) when its direction has the same selector already."""
        raise NotImplementedError

    def update(self, policy: Policy) -> Policy:
        """Add, or replace the policy of the same selector; a replaced policy keeps its index and its age."""
        raise NotImplementedError

    def get(self, direction: Direction, index: PolicyIndex) -> Policy:
        """KernelError(ESRCH) when there is none."""
        raise NotImplementedError

    def find(self, direction: Direction, selector: Selector) -> Policy:
        """The policy of exactly this selector. KernelError(ESRCH) when there is none."""
        raise NotImplementedError

    def delete(self, direction: Direction, selector: Selector) -> Policy:
        raise NotImplementedError

    def delete_index(self, direction: Direction, index: PolicyIndex) -> Policy:
        raise NotImplementedError

    def flush(self) -> int:
        """How many went."""
        raise NotImplementedError

    def snapshot(self) -> list[Policy]:
        """All policies, oldest first."""
        raise NotImplementedError

    def lookup(self, direction: Direction, flow: Flow, if_id: int = 0, mark: int = 0) -> Policy | None:
        raise NotImplementedError

    def lookup_key(self, direction: Direction, key: bytes, if_id: int = 0, mark: int = 0) -> Policy | None:
        """As `lookup`, by a full flow key."""
        raise NotImplementedError

    def check_inbound(self, key: bytes, reqid: ReqId | None, direction: Direction = Direction.IN, if_id: int = 0, mark: int = 0) -> DropReason | None:
        """Whether a packet may come in: None, or why not. `reqid` is that of the SA it came through, None when it came in clear."""
        raise NotImplementedError
