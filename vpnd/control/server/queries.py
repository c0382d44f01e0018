"""What there is besides connections and SAs: certificates, algorithms, counters of exchanges (vici_query.c)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from vpnd.auth.credentials import LoadedCertificate
from vpnd.config.tree import Scalar, Section
from vpnd.control.backend import ControlBackend, ControlError
from vpnd.control.server.messages import success
from vpnd.control.vici.formats import Builder, algorithm_name
from vpnd.ike.algorithms import IKE_TRANSFORMS
from vpnd.ike.crypto.groups import implemented_groups
from vpnd.ike.iana import Encryption, Group, Integrity, PrfId, TransformType
from vpnd.ike.identity import Identity
from vpnd.ike.transform import is_aead

PROVIDER: Final = "cryptography"  # the library that does it all


async def certificates(backend: ControlBackend, request: Section, stream: Callable[[str, Section], Awaitable[None]]) -> Section:
    """`list-certs`: those of a `type`, `flag` and `subject`. There are X.509 certificates and no other kind."""
    kind, flag = (request.text("type") or "ANY").upper(), (request.text("flag") or "ANY").upper()
    subject = request.text("subject")
    try:
        wanted = Identity.parse(subject) if subject else None
    except ValueError as error:
        raise ControlError(str(error)) from error
    if kind == "X509CA":
        kind, flag = "X509", "CA"
    for listed in backend.loaded_certificates() if kind in ("ANY", "X509") else ():
        if flag in ("ANY", "CA" if listed.authority else "NONE") and (wanted is None or listed.certificate.asserts(wanted)):
            await stream("list-cert", _certificate(listed))
    return Section()


def _certificate(listed: LoadedCertificate) -> Section:
    builder = Builder()
    builder.add("type", "X509")
    builder.add("flag", "CA" if listed.authority else "NONE")
    builder.flag("has_privkey", listed.has_key)
    builder.node("data", Scalar(listed.certificate.der))
    return builder.section


async def algorithms() -> Section:
    """`get-algorithms`: those of IKE, under strongSwan's names."""
    encryption = [each for each in IKE_TRANSFORMS if each.type is TransformType.ENCR]
    tables = {
        "encryption": [algorithm_name(Encryption, each.id) for each in encryption if not is_aead(each)],
        "integrity": [algorithm_name(Integrity, each.id) for each in IKE_TRANSFORMS if each.type is TransformType.INTEG],
        "aead": [algorithm_name(Encryption, each.id) for each in encryption if is_aead(each)],
        "prf": ["PRF_" + algorithm_name(PrfId, each.id) for each in IKE_TRANSFORMS if each.type is TransformType.PRF],
        "dh": [algorithm_name(Group, number) for number in sorted(implemented_groups())],
    }
    return Section.of({kind: dict.fromkeys(names, PROVIDER) for kind, names in tables.items()})


async def counters(backend: ControlBackend, name: str | None, *, everything: bool) -> Section:
    """`get-counters`: of a connection, of each, or of the daemon, whose section has no name."""
    known = backend.exchange_counters()
    if everything:
        return _counted({each: known.of(each) or {} for each in known.connections})
    if not name:
        return _counted({"": known.everything()})
    found = known.of(name)
    if found is None:
        raise ControlError("no counters found for this connection")
    return _counted({name: found})


def _counted(counted: Mapping[str, Mapping[str, int]]) -> Section:
    return Section.of({"counters": counted, "success": "yes"})


async def reset_counters(backend: ControlBackend, name: str | None, *, everything: bool) -> Section:
    known = backend.exchange_counters()
    for each in known.connections if everything else (name or None,):
        known.reset(each)
    return success()
