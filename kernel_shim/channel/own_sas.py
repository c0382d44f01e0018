"""Which SAs of a kernel are ours, and which way they go: AF_KEY tells neither."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_shim.model import Direction, SaId, Spi


class OwnSas:
    """Reserved SPIs included. Nothing is searched."""

    def __init__(self) -> None:
        self._directions: dict[SaId, Direction] = {}
        self._inbound: dict[Spi, dict[SaId, None]] = {}

    def __contains__(self, sa: SaId) -> bool:
        return sa in self._directions

    def __iter__(self) -> Iterator[SaId]:
        return iter(self._directions)

    def put(self, sa: SaId, direction: Direction) -> None:
        self.drop(sa)
        self._directions[sa] = direction
        if direction is Direction.IN:
            self._inbound.setdefault(sa.spi, {})[sa] = None

    def drop(self, sa: SaId) -> None:
        if self._directions.pop(sa, None) is not Direction.IN:
            return
        alike = self._inbound[sa.spi]
        del alike[sa]
        if not alike:
            del self._inbound[sa.spi]

    def direction(self, sa: SaId) -> Direction | None:
        return self._directions.get(sa)

    def inbound(self, spi: Spi) -> SaId | None:
        """The one with that SPI; of several, to different addresses of ours, the oldest."""
        return next(iter(self._inbound.get(spi, ())), None)
