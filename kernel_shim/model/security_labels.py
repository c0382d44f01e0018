"""What a key manager hangs on SAs and policies for others to read. A kernel gives it back, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one end of an SA is (RFC 2367 section 2.3.5). Of no meaning to a kernel, which gives it back."""

    type: int
    name: bytes = b""
    id: int = 0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A sensitivity label (RFC 2367 section 2.3.6); bitmaps are whole words of 8 octets. Given back, and nothing else."""

    domain: int
    level: int = 0
    compartments: bytes = b""
    integrity_level: int = 0
    integrity_compartments: bytes = b""


@dataclass(frozen=True, slots=True)
class SecurityContext:
    """What a Linux security module calls an SA or a policy (struct sadb_x_sec_ctx). Given back, and nothing else."""

    algorithm: int
    domain: int
    context: bytes


@dataclass(frozen=True, slots=True)
class Labels:
    """What a key manager hangs on an SA for others to read."""

    source: Identity | None = None
    destination: Identity | None = None
    sensitivity: Sensitivity | None = None
    context: SecurityContext | None = None


NO_LABELS: Final = Labels()
