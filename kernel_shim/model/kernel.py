"""What a kernel can do, and how it refuses."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Self

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.model.policies import Mode, Unresolved


class KernelError(Exception):
    """A kernel refused a request. `errno` is what Linux would answer, `detail` says which field or entry."""

    def __init__(self, errno: int, detail: str) -> None:
        super().__init__(f"{detail} (errno {errno})")
        self.errno = errno
        self.detail = detail

    @classmethod
    def of(cls, error: OSError, what: str, needs: str = "") -> Self:
        """Of a system call for `what` that failed. `needs`: the capability without which it ends with EPERM."""
        hint = f", {needs} is needed" if needs and error.errno == errno.EPERM else ""
        return cls(error.errno or errno.EIO, f"{what}: {error.strerror}{hint}")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kernel can do; it bounds what a key manager proposes, narrows and accepts."""

    name: str
    algorithms: frozenset[EspAlgorithm]
    modes: frozenset[Mode] = field(default_factory=lambda: frozenset(Mode))
    encapsulation_required: bool = False  # ESP only in UDP
    encapsulation_preferred: bool = False  # ESP in UDP is a good deal faster
    esn: bool = True
    maximum_replay_window: int = 4096
    port_ranges: bool = True
    address_ranges: bool = True
    sa_selectors: bool = True
    acquire_flow: bool = True
    unresolved_modes: frozenset[Unresolved] = frozenset({Unresolved.QUEUE})
    tfc_padding: bool = False  # it pads, and takes padding away
    header_copies: bool = True  # each SA has `HeaderCopies` of its own
    labels: bool = False  # it forwards MPLS
    labels_in_full: bool = True  # and all of what is configured of it; else as much as Linux does
    if_ids: bool = False  # policies and SAs of one xfrm interface
    marks: bool = False
    offload: bool = False
    maximum_reqid: int = 0x7FFFFFFF
    binds_ike_sockets: bool = False  # the kernel opens the IKE sockets and hands their descriptors over
