"""Which options of swanctl.conf(5) are known and not implemented yet, and with which values they are harmless nevertheless.

An option in none of these tables and read by no validator is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vpnd.config.reader import Harmless, is_no, is_yes, is_zero, never, one_of

CONNECTION: Final[Mapping[str, Harmless]] = {
    "aggressive": is_no,  # IKEv1
    "pull": is_yes,  # IKEv1
    "vips": never,
    "pools": never,
    "dscp": is_zero,
    "ocsp": one_of("reply", "never"),  # a reply is sent only when there is one
    "mediation": is_no,
    "mediated_by": never,
    "mediation_peer": never,
}

LOCAL: Final[Mapping[str, Harmless]] = {
    "pubkeys": never,
    "eap_id": never,
    "aaa_id": never,
    "xauth_id": never,
}

REMOTE: Final[Mapping[str, Harmless]] = {
    "pubkeys": never,
    "eap_id": never,
    "xauth_id": never,
    "groups": never,
    "cert_policy": never,
    "ca_id": never,
    "revocation": one_of("relaxed"),
}

CERTIFICATE: Final[Mapping[str, Harmless]] = {"handle": never, "slot": never, "module": never}

CHILD: Final[Mapping[str, Harmless]] = {
    "ah_proposals": never,
    "sha256_96": is_no,
    "updown": never,
    "hostaccess": is_no,
    "policies": is_yes,
    "policies_fwd_out": is_no,
    "ipcomp": is_no,
    "interface": never,
    "label": never,
    "label_mode": one_of("system"),
    "per_cpu_sas": is_no,
    "hw_offload": one_of("no", "auto"),
    "icmp": is_no,
}

SECRETS: Final = ("eap", "xauth", "ntlm", "pkcs12", "token")
"""Prefixes of sections in `secrets`."""

DAEMON: Final[Mapping[str, Harmless]] = {"metrics_listen": never}
