"""What is known of the paths between gateways (RFC 1191, RFC 8201)."""

from __future__ import annotations

from typing import Final

from kernel_shim.model import IPAddress

# Specifications
FORGET_SECONDS: Final = 600.0  # RFC 1191 section 6.3: ten minutes until a greater MTU may be tried
_SMALLEST: Final = {4: 552, 6: 1280}  # net.ipv4.route.min_pmtu of Linux, below which forged reports would throttle; RFC 8200 section 5

# Limits of this implementation
MAX_PATHS: Final = 16_384


class PathMtus:
    """MTU of whole outer IP packets by pair of addresses; what is not known is `default`."""

    def __init__(self, default: int) -> None:
        self.default = default
        self._known: dict[tuple[IPAddress, IPAddress], tuple[int, float]] = {}

    def get(self, local: IPAddress, remote: IPAddress) -> int:
        known = self._known.get((local, remote))
        return self.default if known is None else known[0]

    def learn(self, local: IPAddress, remote: IPAddress, mtu: int, now: float) -> bool:
        """True when that changes anything."""
        mtu = max(mtu, _SMALLEST[local.version])
        before = self.get(local, remote)
        self._known.pop((local, remote), None)
        if len(self._known) >= MAX_PATHS:
            del self._known[next(iter(self._known))]
        self._known[local, remote] = (mtu, now + FORGET_SECONDS)  # youngest last, so that the dict is in order of expiry
        return mtu != before

    def next_deadline(self) -> float | None:
        return next(iter(self._known.values()))[1] if self._known else None

    def expire(self, now: float) -> bool:
        """Forget what is old; True when anything was."""
        gone = False
        while self._known and next(iter(self._known.values()))[1] <= now:
            del self._known[next(iter(self._known))]
            gone = True
        return gone
