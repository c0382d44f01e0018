"""Proposals: what an SA may be protected with, and the choice between them (RFC 7296 sections 2.7 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

from kernel_shim.model import Capabilities
from vpnd.ike.algorithms import default_proposals, parse_proposals
from vpnd.ike.iana import ADDITIONAL_KEY_EXCHANGE_TYPES, KEY_EXCHANGE_TYPES, Esn, TransformType
from vpnd.ike.transform import NONE, Proposal, Transform, esp_algorithm, is_aead, number_proposals, proposal_text

__all__ = [
    "NONE",
    "Proposal",
    "Transform",
    "accept",
    "default_proposals",
    "esp_algorithm",
    "is_aead",
    "number_proposals",
    "parse_proposals",
    "proposal_text",
    "select",
    "within",
]

KNOWN_TYPES: Final = frozenset(TransformType)


def select(configured: Sequence[Proposal], offered: Sequence[Proposal], *, prefer_configured: bool = False, group: int | None = None) -> Proposal | None:
    """The responder's choice: one transform a type, with the number and SPI of the peer's proposal; None: NO_PROPOSAL_CHOSEN.

    The order of the offer decides, or with `prefer_configured` our own. `group` is that of the peer's KE payload: it is taken when
    the proposal that is chosen allows it, which spares an INVALID_KE_PAYLOAD.
    """
    pairs = [(own, theirs) for theirs in offered for own in configured]
    if prefer_configured:
        pairs = [(own, theirs) for own in configured for theirs in offered]
    for own, theirs in pairs:
        chosen = _match(own, theirs, prefer_configured, group)
        if chosen is not None:
            return Proposal(theirs.protocol, chosen, theirs.number, theirs.spi)
    return None


def _match(own: Proposal, theirs: Proposal, prefer_own: bool, group: int | None) -> tuple[Transform, ...] | None:
    # RFC 7296 section 3.3.6: a proposal with a transform type that we do not know is refused as a whole.
    if own.protocol != theirs.protocol or any(transform.type not in KNOWN_TYPES for transform in theirs.transforms):
        return None
    types = sorted({transform.type for transform in (*own.transforms, *theirs.transforms)} - {TransformType.ENCR, TransformType.INTEG})
    rest: list[Transform] = []
    for transform_type in types:
        # RFC 9370 section 2.2.2: no key exchange method is used twice
        used = {transform.id for transform in rest if transform.type in KEY_EXCHANGE_TYPES} if transform_type in ADDITIONAL_KEY_EXCHANGE_TYPES else set()
        mine = tuple(transform for transform in own.of_type(transform_type) if transform.id not in used or transform.id == NONE)
        if not mine and own.of_type(transform_type):
            return None
        picked = _pick(mine, theirs.of_type(transform_type), prefer_own, group if transform_type == TransformType.KE else None)
        if picked is None:
            return None
        rest.extend(picked)
    for encryption in _common(own.of_type(TransformType.ENCR), theirs.of_type(TransformType.ENCR), prefer_own):
        integrity = _pick_integrity(own, theirs, encryption, prefer_own)
        if integrity is not None:
            return tuple(sorted((encryption, *integrity, *rest), key=lambda transform: transform.type))
    return None


def _common(own: Sequence[Transform], theirs: Sequence[Transform], prefer_own: bool) -> list[Transform]:
    preferred, other = (own, theirs) if prefer_own else (theirs, own)
    return [transform for transform in preferred if transform in other and not transform.attributes]


def _pick(own: Sequence[Transform], theirs: Sequence[Transform], prefer_own: bool, preferred_id: int | None) -> tuple[Transform, ...] | None:
    """One transform, none () where both sides can do without, or None: no agreement.

    A side that names no transform of a type wants none, which is what id 0 (NONE, or no ESN) says when the other side offers it.
    """
    if not own:
        return _none_of(theirs)
    if not theirs:
        return () if any(transform.id == NONE for transform in own) else None
    common = _common(own, theirs, prefer_own)
    wanted = [transform for transform in common if transform.id == preferred_id]
    return tuple((wanted or common)[:1]) or None


def _none_of(theirs: Sequence[Transform]) -> tuple[Transform, ...] | None:
    if not theirs:
        return ()
    nothing = next((transform for transform in theirs if transform.id == NONE), None)
    return None if nothing is None else (nothing,)


def _pick_integrity(own: Proposal, theirs: Proposal, encryption: Transform, prefer_own: bool) -> tuple[Transform, ...] | None:
    offered = theirs.of_type(TransformType.INTEG)
    # RFC 7296 section 3.3: beside a combined-mode cipher there is no integrity transform, or NONE.
    if is_aead(encryption):
        return _none_of(offered)
    common = [transform for transform in _common(own.of_type(TransformType.INTEG), offered, prefer_own) if transform.id != NONE]
    return (common[0],) if common else None


def accept(sent: Sequence[Proposal], answer: Sequence[Proposal]) -> Proposal | None:
    """The initiator's check of the answer (RFC 7296 section 2.7): one proposal, with the number of one that was sent, one transform a
    type, all of them from that proposal. The result has the peer's SPI; None: the answer is not acceptable."""
    if len(answer) != 1:
        return None
    chosen = answer[0]
    offer = next((proposal for proposal in sent if (proposal.number, proposal.protocol) == (chosen.number, chosen.protocol)), None)
    if offer is None or len({transform.type for transform in chosen.transforms}) != len(chosen.transforms):
        return None
    # The answer is a proposal that contains exactly what was chosen: choosing from it again finds everything or nothing.
    transforms = _match(offer, chosen, False, None)
    return None if transforms is None or len(transforms) != len(chosen.transforms) else replace(chosen, transforms=transforms)


def within(proposals: Sequence[Proposal], capabilities: Capabilities) -> tuple[Proposal, ...]:
    """ESP proposals cut down to what a kernel can do; those of which nothing remains are left out.

    A proposal means every combination of its transforms, so one whose combinations are supported in part becomes several.
    """
    return tuple(part for proposal in proposals for part in _within(proposal, capabilities))


def _within(proposal: Proposal, capabilities: Capabilities) -> list[Proposal]:
    rest = [
        transform
        for transform in proposal.transforms
        if transform.type not in (TransformType.ENCR, TransformType.INTEG)
        and (transform.type != TransformType.ESN or transform.id != Esn.EXTENDED or capabilities.esn)
    ]
    if proposal.of_type(TransformType.ESN) and not any(transform.type == TransformType.ESN for transform in rest):
        return []
    integrity = proposal.of_type(TransformType.INTEG)

    def supported(encryption: Transform) -> tuple[Transform, ...] | None:
        if is_aead(encryption):
            return () if _known(encryption, None, capabilities) else None
        return tuple(transform for transform in integrity if _known(encryption, transform, capabilities)) or None

    parts = []
    for usable, encryptions in groupby(proposal.of_type(TransformType.ENCR), supported):
        if usable is not None:
            parts.append(replace(proposal, transforms=(*encryptions, *usable, *rest)))
    return parts


def _known(encryption: Transform, integrity: Transform | None, capabilities: Capabilities) -> bool:
    try:
        return esp_algorithm(encryption, integrity) in capabilities.algorithms
    except ValueError:
        return False
