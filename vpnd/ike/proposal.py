"""Proposals: what an SA may be protected with (RFC 7296 sections 2.7 and 3.3), their swanctl text, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.model import Capabilities
from vpnd.ike.iana import ProtocolId, TransformType


@dataclass(frozen=True, slots=True)
class Transform:
    """One algorithm. `key_length` is in bits, 0 when the transform carries none.

    `attributes` are those other than the key length, (type, value); a transform that has any is never chosen (RFC 7296 section 3.3.6).
    """

    type: int
    id: int
    key_length: int = 0
    attributes: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """Transforms of which one of each type protects an SA of `protocol`, in order of preference."""

    protocol: int
    transforms: tuple[Transform, ...]
    number: int = 1
    spi: bytes = b""

    def of_type(self, transform_type: int) -> tuple[Transform, ...]:
        return tuple(transform for transform in self.transforms if transform.type == transform_type)

    def first(self, transform_type: int) -> Transform | None:
        return next((transform for transform in self.transforms if transform.type == transform_type), None)

    @property
    def groups(self) -> tuple[int, ...]:
        """Key exchange methods, in order of preference."""
        return tuple(transform.id for transform in self.of_type(TransformType.KE))

    @property
    def esn(self) -> bool:
        """Of a chosen ESP proposal: whether it has extended sequence numbers."""
        raise NotImplementedError

    def with_spi(self, spi: bytes) -> Self:
        return replace(self, spi=spi)

    def numbered(self, number: int) -> Self:
        return replace(self, number=number)

    def without_key_exchange(self) -> Self:
        """For the CHILD_SA of IKE_AUTH, which has no KE payload (RFC 7296 section 1.2)."""
        raise NotImplementedError

    def esp_algorithm(self) -> EspAlgorithm:
        """Of a chosen ESP proposal. Raises ValueError when it is not one that kernels know."""
        raise NotImplementedError

    def text(self) -> str:
        """As strongSwan prints it: `AES_GCM_16-128/PRF_HMAC_SHA2_256/CURVE_25519`."""
        raise NotImplementedError


def parse_proposals(protocol: ProtocolId, text: str) -> tuple[Proposal, ...]:
    """A comma-separated list of swanctl proposals. Raises ValueError that names the keyword."""
    raise NotImplementedError


def default_proposals(protocol: ProtocolId) -> tuple[Proposal, ...]:
    raise NotImplementedError


def select(configured: Sequence[Proposal], offered: Sequence[Proposal], *, prefer_configured: bool = False, group: int | None = None) -> Proposal | None:
    """The responder's choice: one transform a type, with the number and SPI of the peer's proposal; None: NO_PROPOSAL_CHOSEN.

    `group` is that of the peer's KE payload: chosen when the chosen proposal allows it.
    """
    raise NotImplementedError


def accept(sent: Sequence[Proposal], answer: Sequence[Proposal]) -> Proposal | None:
    """The initiator's check of the answer: one proposal, with one transform a type, all of them from the proposal sent with its number."""
    raise NotImplementedError


def within(proposals: Sequence[Proposal], capabilities: Capabilities) -> tuple[Proposal, ...]:
    """ESP proposals cut down to what a kernel can do; those of which nothing remains are left out."""
    raise NotImplementedError


def number_proposals(proposals: Sequence[Proposal], spi: bytes = b"") -> tuple[Proposal, ...]:
    """The proposals numbered from 1, each with `spi`, ready to send."""
    return tuple(replace(proposal, number=number, spi=spi) for number, proposal in enumerate(proposals, 1))
