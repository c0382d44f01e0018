"""What is ours in the kernel: reqids and policy indexes with the top bit set (`OURS`), so that nothing of another key manager is taken for ours."""

from __future__ import annotations

import errno

from kernel_shim.model import KernelError, ReqId
from kernel_shim.xfrm.constants import OURS


def kernel_reqid(reqid: ReqId) -> int:
    if not 0 <= reqid < OURS:
        raise KernelError(errno.EINVAL, f"reqid {reqid} is beyond 31 bits")
    return OURS | reqid


def is_ours(number: int) -> bool:
    """Whether a kernel's reqid or policy index is one of ours."""
    return bool(number & OURS)


def reqid_from(number: int) -> ReqId:
    return ReqId(number & ~OURS)
