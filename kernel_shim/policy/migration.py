"""Templates that go to other outer addresses (SADB_X_MIGRATE; Linux' xfrm_policy_migrate)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kernel_shim.model import Mode, Move, Template


def moved(templates: Sequence[Template], moves: Sequence[Move]) -> tuple[Template, ...] | None:
    """The templates afterwards; None when no move is about any of them."""
    matched = False
    after = []
    for template in templates:
        for move in moves:
            if _matches(template, move):
                matched = True
                # An address that the template leaves open stays open.
                source = None if template.source is None else move.new_source
                destination = None if template.destination is None else move.new_destination
                template = replace(template, source=source, destination=destination)
                break
        after.append(template)
    return tuple(after) if matched else None


def _matches(template: Template, move: Move) -> bool:
    if template.mode is not move.mode or move.reqid not in (0, template.reqid):
        return False
    if template.mode is Mode.TRANSPORT and template.source is None and template.destination is None:
        return True
    return template.source in (None, move.old_source) and template.destination in (None, move.old_destination)
