"""How errors and numbers are put into words, for logs and answers."""

from __future__ import annotations

from typing import Final

from kernel_shim.model import KernelError

LONGEST: Final = 500  # characters of a line about what a stranger said: identities may have tens of thousands


def explained(error: Exception) -> str:
    """What `error` says to a person: without the number of an errno, but with the file that it is about."""
    if isinstance(error, KernelError):
        return error.detail
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def counted(count: int, one: str, many: str = "") -> str:
    """`1 peer`, `2 peers`; `many` where the plural is not made by an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def abridged(text: str) -> str:
    """`text` within `LONGEST` characters: its beginning and its end."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}[...]{text[-half:]}"
