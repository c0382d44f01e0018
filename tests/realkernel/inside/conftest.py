"""These tests run inside the guest of `tests/realkernel/boot` only; `test_real_kernel.py` beside this folder brings them there."""

from __future__ import annotations

import os

import lab.gateway
import lab.strongswan

EMULATION = 6  # how many times longer things may take in the guest

collect_ignore_glob = [] if os.environ.get("REALKERNEL_GUEST") else ["test_*.py"]

if os.environ.get("REALKERNEL_GUEST"):
    for module in (lab.gateway, lab.strongswan):
        module.READY_SECONDS *= EMULATION
