"""Pseudo-random functions (transform type 2) and prf+ (RFC 7296 section 2.13)."""

from __future__ import annotations


class Prf:
    """`length` is both its output and its preferred key length, in octets."""

    __slots__ = ("id", "length")

    id: int
    length: int

    def __call__(self, key: bytes, data: bytes) -> bytes:
        raise NotImplementedError

    def plus(self, key: bytes, seed: bytes, length: int) -> bytes:
        """prf+ (RFC 7296 section 2.13), `length` octets of it; at most 255 blocks."""
        raise NotImplementedError


def prf(number: int) -> Prf:
    """The function with that transform id. Raises KeyError when it is not implemented."""
    raise NotImplementedError
