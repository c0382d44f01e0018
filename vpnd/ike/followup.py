"""Key exchanges that a CREATE_CHILD_SA request of the peer's still lacks (RFC 9370 section 2.2.4), while we wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kernel_shim.secret import Secret
from vpnd.ike.steps import Response, Steps

MAX_FOLLOWUPS: Final = 4  # at once of one IKE SA; each holds an SPI
FOLLOWUP_SECONDS: Final = 20.0  # RFC 9370 section 2.2.4 advises 5 to 20 s for the next request
LINK_LENGTH: Final = 8  # octets


@dataclass(slots=True, eq=False)
class Followup:
    """`pending` methods are to come, `shared` are the secrets of those that are done, the first one's included.

    `finish` makes the SA once all are there, `give_up` takes back what was reserved for it. `of_ike`: the IKE SA is what it rekeys.
    """

    pending: deque[int]
    shared: list[Secret] = field(repr=False)
    finish: Callable[[tuple[Secret, ...]], Steps[Response]] = field(repr=False)
    give_up: Callable[[], None] = field(repr=False)
    of_ike: bool = False
    link: bytes = b""
