"""Diffie-Hellman: X25519 and X448 (RFC 8031), ECP (RFC 5903), MODP (RFC 3526), with the tests of RFC 6989.

Private keys come from the caller's entropy, none from the library's own generator. All arithmetic with a private key is OpenSSL's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric import dh, ec, x448, x25519

from kernel_shim.secret import Secret
from vpnd.ike import iana
from vpnd.ike.crypto import Entropy
from vpnd.ike.crypto.exchange import Group, InvalidPublicValue, KeyExchange
from vpnd.ike.crypto.primes import MODP_PRIMES

# The library deprecates finite-field Diffie-Hellman as a whole; that an operator's peer still needs it is no news at run time.
warnings.filterwarnings("ignore", message="Diffie-Hellman over finite fields")


@dataclass(frozen=True, slots=True)
class _Exchange:
    group: int
    public: bytes
    _public_length: int
    _agree: Callable[[bytes], bytes] = field(repr=False)

    def complete(self, peer: bytes) -> Secret:
        # RFC 7296 section 3.4 and RFC 5903 section 7: the length is the group's, leading zeros included.
        if len(peer) != self._public_length:
            raise InvalidPublicValue(f"public value of {len(peer)} octets, {self._public_length} expected")
        try:
            return Secret(self._agree(peer))
        except ValueError:
            raise InvalidPublicValue("public value is not a valid element of its group") from None


@dataclass(frozen=True, slots=True)
class DhGroup:
    """A Diffie-Hellman method: both sides do the same. `generate` gives the public value and the agreement with a peer's."""

    id: int
    public_length: int
    generate: Callable[[Entropy], tuple[bytes, Callable[[bytes], bytes]]] = field(repr=False)

    def initiate(self, entropy: Entropy) -> KeyExchange:
        public, agree = self.generate(entropy)
        return _Exchange(self.id, public, self.public_length, agree)

    def respond(self, peer: bytes, entropy: Entropy) -> tuple[bytes, Secret]:
        exchange = self.initiate(entropy)
        return exchange.public, exchange.complete(peer)


def _x25519(entropy: Entropy) -> tuple[bytes, Callable[[bytes], bytes]]:
    private = x25519.X25519PrivateKey.from_private_bytes(entropy(32))
    # RFC 7748 section 6.1: `exchange` raises ValueError for a shared secret of zeros, which small-order points give.
    return private.public_key().public_bytes_raw(), lambda peer: private.exchange(x25519.X25519PublicKey.from_public_bytes(peer))


def _x448(entropy: Entropy) -> tuple[bytes, Callable[[bytes], bytes]]:
    private = x448.X448PrivateKey.from_private_bytes(entropy(56))
    return private.public_key().public_bytes_raw(), lambda peer: private.exchange(x448.X448PublicKey.from_public_bytes(peer))


_EXTRA_OCTETS: Final = 8  # FIPS 186-5 A.2.1: 64 extra random bits make the bias of the reduction negligible
_UNCOMPRESSED: Final = b"\x04"


def _ecp(curve: ec.EllipticCurve) -> Callable[[Entropy], tuple[bytes, Callable[[bytes], bytes]]]:
    size = (curve.key_size + 7) // 8
    order = curve.group_order

    def generate(entropy: Entropy) -> tuple[bytes, Callable[[bytes], bytes]]:
        scalar = int.from_bytes(entropy(size + _EXTRA_OCTETS), "big") % (order - 1) + 1
        private = ec.derive_private_key(scalar, curve)
        point = private.public_key().public_numbers()

        def agree(peer: bytes) -> bytes:
            # RFC 6989 section 2.3: from_encoded_point refuses what is not on the curve. RFC 5903 section 9: the secret is x alone.
            return private.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(curve, _UNCOMPRESSED + peer))

        return point.x.to_bytes(size, "big") + point.y.to_bytes(size, "big"), agree

    return generate


_GENERATOR: Final = 2


def _modp(prime: int, exponent_octets: int) -> Callable[[Entropy], tuple[bytes, Callable[[bytes], bytes]]]:
    size = (prime.bit_length() + 7) // 8
    parameters = dh.DHParameterNumbers(prime, _GENERATOR)

    def element(value: int) -> dh.DHPublicKey:
        # RFC 6989 section 2.1: 1 < r < p - 1 suffices where p is a safe prime.
        if not 1 < value < prime - 1:
            raise ValueError("out of range")
        return dh.DHPublicNumbers(value, parameters).public_key()

    def generate(entropy: Entropy) -> tuple[bytes, Callable[[bytes], bytes]]:
        exponent = int.from_bytes(entropy(exponent_octets), "big") | 1 << (exponent_octets * 8 - 1)
        # The library wants a public value beside an exponent but never uses it; agreeing with the generator yields the true one,
        # in OpenSSL's constant time, which Python's pow() has not.
        private = dh.DHPrivateNumbers(exponent, dh.DHPublicNumbers(_GENERATOR, parameters)).private_key()
        public = private.exchange(element(_GENERATOR)).rjust(size, b"\0")
        return public, lambda peer: private.exchange(element(int.from_bytes(peer, "big"))).rjust(size, b"\0")

    return generate


# Twice the group's strength in bits (RFC 3526 section 8), rounded up to octets.
_EXPONENT_OCTETS: Final = {
    iana.Group.MODP_2048: 40,
    iana.Group.MODP_3072: 48,
    iana.Group.MODP_4096: 56,
    iana.Group.MODP_6144: 64,
    iana.Group.MODP_8192: 72,
}

DH_GROUPS: Final[dict[int, Group]] = {
    iana.Group.CURVE_25519: DhGroup(iana.Group.CURVE_25519, 32, _x25519),
    iana.Group.CURVE_448: DhGroup(iana.Group.CURVE_448, 56, _x448),
    iana.Group.ECP_256: DhGroup(iana.Group.ECP_256, 64, _ecp(ec.SECP256R1())),
    iana.Group.ECP_384: DhGroup(iana.Group.ECP_384, 96, _ecp(ec.SECP384R1())),
    iana.Group.ECP_521: DhGroup(iana.Group.ECP_521, 132, _ecp(ec.SECP521R1())),
    **{number: DhGroup(number, prime.bit_length() // 8, _modp(prime, _EXPONENT_OCTETS[number])) for number, prime in MODP_PRIMES.items()},
}
