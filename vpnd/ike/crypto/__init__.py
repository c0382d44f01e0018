"""The cryptography of an IKE SA: key exchange, pseudo-random functions, and the protection of SK payloads."""

from __future__ import annotations

from collections.abc import Callable

Entropy = Callable[[int], bytes]
"""Gives that many random octets: `os.urandom` in a daemon, a seeded generator in a simulation."""
