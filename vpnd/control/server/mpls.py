"""The commands `x-mpls` and `x-mpls-trace`, which are ours: what stands in the label node, and what would become of a packet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from kernel_shim.model import IPAddress
from kernel_shim.mpls.labels import LAST_LABEL, MAX_DEPTH, Label
from vpnd.config.reader import integer, shown
from vpnd.config.tree import Section
from vpnd.control.backend import ControlBackend, ControlError

Stream = Callable[[str, Section], Awaitable[None]]


async def rows(backend: ControlBackend, request: Section, stream: Stream) -> Section:
    """An event `x-mpls-row` for each row of `table`; with `vrf` only what is that VRF's."""
    for row in backend.mpls_rows(request.text("table") or "", request.text("vrf")):
        await stream("x-mpls-row", Section.of(row))
    return Section()


async def trace(backend: ControlBackend, request: Section) -> Section:
    """`steps`, each with `at` and `found`: of a packet of `vrf` to `address`, or of one that `peer` sent under `labels` (outermost first)."""
    address, peer = _address(request.text("address")), request.text("peer")
    if peer is not None:
        steps = backend.trace_from_peer(peer, _labels(request.text("labels") or ""), address)
    elif address is not None:
        steps = backend.trace_from_vrf(request.text("vrf") or "", address)
    else:
        raise ControlError("an address is missing")
    return Section.of({"success": "yes", "steps": {str(number): {"at": step.at, "found": step.found} for number, step in enumerate(steps, 1)}})


def _address(text: str | None) -> IPAddress | None:
    try:
        return ip_address(text) if text else None
    except ValueError:
        raise ControlError(f"'{shown(text or '')}' is not an address") from None


def _labels(text: str) -> list[Label]:
    try:
        found = [Label(integer(part.strip(), 0, LAST_LABEL)) for part in text.split(",")]
    except ValueError as error:
        raise ControlError(str(error)) from None
    if len(found) > MAX_DEPTH:
        raise ControlError(f"more than {MAX_DEPTH} labels")
    return found
