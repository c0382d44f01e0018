"""What strongSwan calls an alert: something that an operator should hear of went wrong with an IKE SA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vpnd.ike.effects import Reason

OF_IKE_SAS: Final[Mapping[Reason, str]] = {
    Reason.AUTHENTICATION_FAILED: "peer-auth-failed",
    Reason.PEER_AUTHENTICATION_FAILED: "local-auth-failed",
    Reason.NO_CREDENTIALS: "local-auth-failed",
    Reason.NO_PROPOSAL_CHOSEN: "proposal-mismatch-ike",
    Reason.HALF_OPEN_TIMEOUT: "half-open-timeout",
    Reason.EXPIRED: "ike-sa-expired",
    Reason.PEER_SILENT: "retransmit-send-timeout",
    Reason.NOT_UNIQUE: "unique-keep",
    Reason.REPLACED: "unique-replace",
    Reason.INVALID_SYNTAX: "parse-error-body",
}
"""Why it is closed."""

OF_CHILD_SAS: Final[Mapping[Reason, str]] = {
    Reason.NO_PROPOSAL_CHOSEN: "proposal-mismatch-child",
    Reason.TS_UNACCEPTABLE: "ts-mismatch",
    Reason.KERNEL_REFUSED: "install-child-sa-failed",
}
"""Why a CHILD_SA was not made."""

PEER_INIT_UNREACHABLE: Final = "peer-init-unreachable"
