"""Modes: `XFRM_MODE_*` and those of `kernel_shim.model`."""

from __future__ import annotations

from typing import Final

from kernel_shim.model import Mode
from kernel_shim.xfrm.constants import XfrmMode
from kernel_shim.xfrm.structs import MalformedMessage

_MODES: Final = {Mode.TRANSPORT: XfrmMode.TRANSPORT, Mode.TUNNEL: XfrmMode.TUNNEL}
_MODES_BACK: Final = {there: here for here, there in _MODES.items()}


def mode_number(mode: Mode) -> int:
    return _MODES[mode]


def mode_from(number: int) -> Mode:
    try:
        return _MODES_BACK[XfrmMode(number)]
    except ValueError:
        raise MalformedMessage(f"mode {number}") from None
