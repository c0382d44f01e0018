"""Pseudo-random functions (transform type 2) and prf+ (RFC 7296 section 2.13): HMAC with SHA-1 or SHA-2 (RFC 2104, RFC 4868)."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.hmac import HMAC

from vpnd.ike.iana import PrfId

MAX_BLOCKS: Final = 255  # RFC 7296 section 2.13: the block counter is one octet


@dataclass(frozen=True, slots=True)
class Prf:
    """A keyed function for keys of any length. `length` is both its output and its preferred key length, in octets."""

    id: int
    length: int
    _digest: str = field(repr=False)
    _hash: HashAlgorithm = field(repr=False, compare=False)

    def __call__(self, key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, self._digest)

    def plus(self, key: bytes, seed: bytes, length: int) -> bytes:
        """prf+(key, seed), `length` octets of it. Raises ValueError beyond MAX_BLOCKS outputs."""
        count = -(-length // self.length)
        if count > MAX_BLOCKS:
            raise ValueError(f"prf+ gives at most {MAX_BLOCKS * self.length} octets")
        keyed = HMAC(key, self._hash)  # the key is scheduled once: each block begins with a copy
        block = b""
        blocks: list[bytes] = []
        for number in range(1, count + 1):
            context = keyed.copy()
            context.update(block + seed + bytes((number,)))
            block = context.finalize()
            blocks.append(block)
        return b"".join(blocks)[:length]


_PRFS: Final[dict[int, Prf]] = {
    PrfId.HMAC_SHA1: Prf(PrfId.HMAC_SHA1, 20, "sha1", SHA1()),  # noqa: S303 - for operators that name it
    PrfId.HMAC_SHA2_256: Prf(PrfId.HMAC_SHA2_256, 32, "sha256", SHA256()),
    PrfId.HMAC_SHA2_384: Prf(PrfId.HMAC_SHA2_384, 48, "sha384", SHA384()),
    PrfId.HMAC_SHA2_512: Prf(PrfId.HMAC_SHA2_512, 64, "sha512", SHA512()),
}


def prf(number: int) -> Prf:
    """The function with that transform id. Raises KeyError when it is not implemented."""
    return _PRFS[number]
