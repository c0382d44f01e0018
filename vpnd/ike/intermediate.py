"""What IKE_INTERMEDIATE leaves behind for IKE_AUTH: key exchanges still to be done, and a digest of its messages that AUTH covers (RFC 9242, RFC 9370)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vpnd.ike.crypto.prf import Prf
from vpnd.ike.keymat import IkeKeys


@dataclass(slots=True)
class Intermediate:
    """Of one IKE SA. `pending` are the additional key exchange methods that were agreed on and not done yet, in their order."""

    pending: deque[int] = field(default_factory=deque)
    exchanges: int = 0  # that are complete
    _of_initiator: bytes = b""
    _of_responder: bytes = b""

    def cover(self, prf: Prf, keys: IkeKeys, plain: bytes, *, response: bool) -> None:
        """RFC 9242 section 3.3.2: IntAuth_N = prf(SK_p, IntAuth_N-1 | message), of requests with SK_pi and of responses with SK_pr.

        `keys` protect the message; those that its key exchange makes come after it. `plain` is its `plain_form`.
        """
        if response:
            self._of_responder = prf(keys.pr.reveal(), self._of_responder + plain)
            self.exchanges += 1
        else:
            self._of_initiator = prf(keys.pi.reveal(), self._of_initiator + plain)

    @property
    def octets(self) -> bytes:
        """RFC 9242 section 3.3.2: IntAuth_i | IntAuth_r | message id of the first IKE_AUTH request; nothing when there was no IKE_INTERMEDIATE."""
        # IKE_SA_INIT has the message id 0
        return self._of_initiator + self._of_responder + (1 + self.exchanges).to_bytes(4, "big") if self.exchanges else b""
