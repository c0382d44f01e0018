"""What came of `pfkey_conversation`: as Linux 6.1 answers, recorded from its AF_KEY, and where our shim answers otherwise, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

LINUX: Final[Mapping[str, str]] = {
    "a header cut short": "EMSGSIZE",
    "version 1": "EINVAL",
    "a reserved field in the header": "EINVAL",
    "message type 0": "EINVAL",
    "message type 25": "EINVAL",
    "a length beyond the message": "EMSGSIZE",
    "a length short of the message": "EMSGSIZE",
    "an extension of no length": "EINVAL",
    "an extension beyond the message": "EINVAL",
    "extension type 0": "EINVAL",
    "an unknown extension": "ESRCH",
    "an extension twice": "EINVAL",
    "an address of another length": "EINVAL",
    "a prefix of 33 bits": "EINVAL",
    "address family 99": "EINVAL",
    "a key shorter than its bits": "EINVAL",
    "EXPIRE from a client": "EOPNOTSUPP",
    "X_PCHANGE from a client": "EOPNOTSUPP",
    "X_SPDACQUIRE from a client": "EOPNOTSUPP",
    "X_SPDEXPIRE from a client": "EOPNOTSUPP",
    "X_NAT_T_NEW_MAPPING from a client": "EOPNOTSUPP",
    "REGISTER": "REGISTER(supported:auth,encrypt)",
    "REGISTER again": "EEXIST",
    "REGISTER for AH": "REGISTER(supported:auth,encrypt)",
    "REGISTER for nothing": "REGISTER(supported:auth,encrypt)",
    "REGISTER for an unknown SA type": "EINVAL",
    "GETSPI": "GETSPI(address:dst,src lifetime:current,hard,soft sa x_sa2)",
    "GETSPI of a range upside down": "EINVAL",
    "GETSPI of an SPI that is taken": "ENOENT",
    "GETSPI without a range": "GETSPI(address:dst,src lifetime:current,hard,soft sa x_sa2)",
    "GETSPI without a destination": "EINVAL",
    "GETSPI of two families": "EINVAL",
    "GETSPI of an unknown mode": "EINVAL",
    "GETSPI for an unknown SA type": "EINVAL",
    "GET of a larval SA": "GET(address:dst,src lifetime:current,hard,soft sa x_sa2)",
    "UPDATE of a larval SA": "UPDATE(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "UPDATE of a mature SA": "UPDATE(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "UPDATE that takes the encapsulation away": "EINVAL",
    "UPDATE without keys": "EINVAL",
    "UPDATE of none": "ESRCH",
    "ADD": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "ADD again": "EEXIST",
    "ADD without its destination": "EINVAL",
    "ADD without SA": "EINVAL",
    "ADD without a key of the cipher": "EINVAL",
    "ADD without a key of the authentication": "ADD(address:dst,proxy,src key:encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "ADD with a hard lifetime alone": "EINVAL",
    "ADD with a soft lifetime alone": "EINVAL",
    "ADD without lifetimes": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "ADD with authentication 200": "ENOSYS",
    "ADD with authentication 252": "EINVAL",
    "ADD with cipher 200": "ENOSYS",
    "ADD with cipher 254": "EINVAL",
    "ADD with a cipher key of 7 octets": "EINVAL",
    "ADD with AES-GCM": "ENOSYS",
    "ADD with HMAC-SHA2-256": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "ADD with HMAC-SHA2-512": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "ADD with AES-CTR": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "ADD of an unknown mode": "EINVAL",
    "ADD without UDP encapsulation": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_sa2) | =",
    "ADD for an unknown SA type": "EINVAL",
    "GET": "GET(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2)",
    "GET of none": "ESRCH",
    "GET without SA": "EINVAL",
    "GET without addresses": "EINVAL",
    "GET for an unknown SA type": "ESRCH",
    "DUMP of AH": "ENOENT",
    "DUMP for an unknown SA type": "EINVAL",
    "FLUSH": "FLUSH() FLUSH() | FLUSH()",
    "FLUSH of nothing": "FLUSH()",
    "FLUSH for an unknown SA type": "EINVAL",
    "DUMP of nothing": "ENOENT",
    "ADD of one to be dumped": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "ADD of another to be dumped": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "DUMP": (
        "DUMP#1(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) "
        "DUMP#0(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2)"
    ),
    "DELETE of none": "ESRCH",
    "DELETE without SA": "EINVAL",
    "DELETE for an unknown SA type": "ESRCH",
    "DELETE": "DELETE(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "DELETE again": "ESRCH",
    "DELETE of the last": "DELETE(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "SPDDUMP of nothing": "ENOENT",
    "SPDFLUSH of nothing": "X_SPDFLUSH()",
    "SPDADD": "X_SPDADD(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDADD again": "EEXIST",
    "SPDADD of another priority": "EEXIST",
    "SPDUPDATE": "X_SPDUPDATE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDUPDATE of none": "X_SPDUPDATE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDSETIDX": "X_SPDADD(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDADD without a policy": "EINVAL",
    "SPDADD without addresses": "EINVAL",
    "SPDADD without direction": "EINVAL",
    "SPDADD of direction 4": "EINVAL",
    "SPDADD of type 3": "EINVAL",
    "SPDADD that protects with TCP": "EINVAL",
    "SPDADD that protects with AH": "X_SPDUPDATE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDADD of mode 0": "EINVAL",
    "SPDADD of mode 9": "EINVAL",
    "SPDADD of a tunnel without ends": "EINVAL",
    "SPDADD of seven templates": "ELOOP",
    "SPDADD that protects with nothing": "X_SPDUPDATE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDUPDATE to discard": "X_SPDUPDATE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDUPDATE to let pass": "X_SPDUPDATE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDUPDATE with a reqid over 16383": "X_SPDUPDATE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDGET": "X_SPDGET(address:dst,src lifetime:current,hard,soft x_policy)",
    "SPDGET of none": "ENOENT",
    "SPDGET without a policy": "EINVAL",
    "SPDGET of a direction that is none": "EINVAL",
    "SPDDUMP": (
        "X_SPDDUMP#1(address:dst,src lifetime:current,hard,soft x_policy) X_SPDDUMP#2(address:dst,src lifetime:current,hard,soft x_policy) "
        "X_SPDDUMP#0(address:dst,src lifetime:current,hard,soft x_policy)"
    ),
    "SPDDELETE of none": "ENOENT",
    "SPDDELETE without a policy": "EINVAL",
    "SPDDELETE": "X_SPDDELETE(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDDELETE2 of none": "ENOENT",
    "SPDDELETE2 without a policy": "EINVAL",
    "a packet without an SA": "ACQUIRE!(address:dst,src proposal x_policy)",
    "another packet without an SA": "-",
    "ACQUIRE with extensions": "EOPNOTSUPP",
    "ACQUIRE that nobody made is given up": "-",
    "an ACQUIRE is given up": "-",
    "SPDDELETE2": "X_SPDDELETE2(address:dst,src lifetime:current,hard,soft x_policy) | =",
    "SPDFLUSH": "X_SPDFLUSH() X_SPDFLUSH() | X_SPDFLUSH()",
    "ADD that lives shortly": "ADD(address:dst,proxy,src key:auth,encrypt lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =",
    "its soft lifetime ends": "EXPIRE!(address:dst,proxy,src lifetime:current,soft sa x_nat_t:dport,sport,type x_sa2)",
    "its hard lifetime ends": "EXPIRE!(address:dst,proxy,src lifetime:current,hard sa x_nat_t:dport,sport,type x_sa2)",
    "GET of an SA that expired": "ESRCH",
    "PROMISC": "X_PROMISC() X_PROMISC() | X_PROMISC()",
    "a copy for who is promiscuous": "GET(address:dst,src sa) ESRCH ESRCH",
    "PROMISC no more": "X_PROMISC() X_PROMISC() | X_PROMISC()",
    "PROMISC, neither on nor off": "EINVAL",
    "MIGRATE without a policy": "EINVAL",
    "MIGRATE of none": "ENOENT",
}

OURS: Final[Mapping[str, tuple[str, str]]] = {
    "UPDATE that takes the encapsulation away": ("EPROTONOSUPPORT", "the userspace kernel knows ESP in UDP only, and says so"),
    "UPDATE without keys": ("ESRCH", "ours moves lifetimes and ports of an SA without having its keys repeated"),
    "ADD without a key of the authentication": ("EINVAL", "Linux takes an HMAC with an empty key, which protects nothing"),
    "ADD with a hard lifetime alone": ("ADD(address:dst,src lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =", "RFC 2367 asks for no pair"),
    "ADD with a soft lifetime alone": ("ADD(address:dst,src lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =", "RFC 2367 asks for no pair"),
    "ADD with AES-GCM": ("ADD(address:dst,src lifetime:current,hard,soft sa x_nat_t:dport,sport,type x_sa2) | =", "AF_KEY has no way in for an AEAD"),
    "ADD without UDP encapsulation": ("EPROTONOSUPPORT", "the userspace kernel knows ESP in UDP only"),
    "FLUSH": ("FLUSH() | =", "Linux answers, and then tells everybody, who asked too"),
    "SPDSETIDX": ("X_SPDSETIDX(address:dst,src x_policy) | =", "ours answers with the type that was asked"),
    "SPDADD that protects with AH": ("EPROTONOSUPPORT", "the userspace kernel has no AH"),
    "SPDADD that protects with nothing": ("EINVAL", "Linux lets such packets pass in clear"),
    "SPDFLUSH": ("X_SPDFLUSH() | =", "Linux answers, and then tells everybody, who asked too"),
    "its soft lifetime ends": ("EXPIRE!(address:dst,src lifetime:current,soft sa x_sa2)", "an Expire names the SA, and nothing more of it"),
    "its hard lifetime ends": ("EXPIRE!(address:dst,src lifetime:current,hard sa x_sa2)", "an Expire names the SA, and nothing more of it"),
    "PROMISC": ("X_PROMISC()", "ours tells who asked, once"),
    "a copy for who is promiscuous": ("ESRCH", "a client of ours is spared the copies of its own conversation"),
    "PROMISC no more": ("X_PROMISC()", "ours tells who asked, once"),
}
"""The outcome on our shim, and the reason of the difference."""

_HEARD: Final = re.compile(r"([A-Z][A-Z0-9_]*[#!0-9]*)\(([^)]*)\)")


def without_untold(outcome: str) -> str:
    """`outcome` without what only Linux tells.

    Those are keys, which do not leave the shim; ADDRESS_PROXY, for an SA of ours has no selector beside those of its policies but X_SA_SOURCES
    and X_SA_DESTINATIONS; and lifetimes of a policy that it has not: Linux tells of all three, with zeros.
    """

    def one(heard: re.Match[str]) -> str:
        name, groups = heard[1], heard[2].split()
        kept = [group for group in groups if not group.startswith("key:") and not (name.startswith("X_SPD") and group.startswith("lifetime:"))]
        return f"{name}({' '.join(group.replace(',proxy', '') for group in kept)})"

    return _HEARD.sub(one, outcome)


def expected_of_ours() -> dict[str, str]:
    return {step: OURS[step][0] if step in OURS else without_untold(outcome) for step, outcome in LINUX.items()}
