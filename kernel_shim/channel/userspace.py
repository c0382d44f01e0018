"""What our own data plane can do, as far as it is known without asking: a shim that may not open raw sockets carries ESP only in UDP."""

from __future__ import annotations

from typing import Final

from kernel_shim.algorithms import USERSPACE as ALGORITHMS
from kernel_shim.model import Capabilities, Unresolved

USERSPACE: Final = Capabilities(
    name="userspace",
    algorithms=ALGORITHMS,
    encapsulation_preferred=True,
    tfc_padding=True,
    labels=True,
    unresolved_modes=frozenset(Unresolved),
    binds_ike_sockets=True,
)
