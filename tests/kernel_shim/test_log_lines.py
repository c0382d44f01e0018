"""What log lines say of errors, and what they never say."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from kernel_shim.logs import redact
from kernel_shim.model import KernelError
from kernel_shim.secret import Secret
from vpnd.telemetry.wording import counted, explained


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KernelError(errno.EPERM, "interface vpn0: not permitted"), "interface vpn0: not permitted"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/run/x"), "/run/x: No such file or directory"),
        (OSError("no number"), "no number"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("as it is"), "as it is"),
    ],
    ids=repr,
)
def test_an_error_is_explained_without_numbers(error: Exception, text: str) -> None:
    assert explained(error) == text


@pytest.mark.parametrize("kind", [Secret, bytes, bytearray, memoryview])
def test_what_may_be_key_material_shows_its_length_alone(kind: Callable[[bytes], object]) -> None:
    line = redact(None, "info", {"event": "keys", "key": kind(b"0123456789"), "spi": 7})
    assert line == {"event": "keys", "key": "<10 bytes>", "spi": 7}


def test_numbers_have_their_plural() -> None:
    assert [counted(0, "child", "children"), counted(1, "child", "children"), counted(2, "peer")] == ["0 children", "1 child", "2 peers"]
