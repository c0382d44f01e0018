"""Who may open an IKE SA: cookies under load, and limits on half-open IKE SAs (RFC 7296 section 2.6).

Pure, and stateless towards strangers: nothing that it remembers grows with who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kernel_shim.model import Endpoint, IPAddress
from vpnd.ike.cookie import CookieJar, cookie_reply, invalid_major_version, parse_init_request, unsupported_critical_payload
from vpnd.ike.crypto import Entropy

ONE_SUBSCRIBER: Final = 8  # octets of an IPv6 address: a host has the /64 for itself (RFC 8019)
MAX_OPENING: Final = 8192  # octets of a stranger's request, of which a ticket takes 4096 and ML-KEM-1024 1568: to read it takes time, and an IKE SA keeps it


def origin_of(address: IPAddress) -> bytes:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 address."""
    return address.packed[: ONE_SUBSCRIBER if address.version == 6 else None]


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Numbers of half-open IKE SAs; 0 switches a rule off, except `limit`. One address is what `origin_of` makes one."""

    cookie_threshold: int = 30  # from here on every initiator must return a cookie
    cookie_threshold_ip: int = 3  # the same, counted for one address
    block_threshold: int = 5  # of one address
    limit: int = 1000  # in all


@dataclass(frozen=True, slots=True)
class Admitted:
    """Answer it as a responder."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this and remember nothing."""

    answer: bytes
    counter: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Say nothing."""

    counter: str


class Gate:
    def __init__(self, settings: GateSettings, entropy: Entropy) -> None:
        self._settings = settings
        self._cookies = CookieJar(entropy)

    def judge(self, datagram: bytes, remote: Endpoint, half_open: int, half_open_of_address: int, now: float) -> Admitted | Reply | Refused:
        """An IKE_SA_INIT request of an initiator that has no IKE SA here yet."""
        if len(datagram) > MAX_OPENING:
            return Refused("ike_opening_too_long")
        newer = invalid_major_version(datagram)
        if newer is not None:
            return Reply(newer, "ike_invalid_major_version")
        request = parse_init_request(datagram)
        if request is None:
            unknown = unsupported_critical_payload(datagram)
            return Refused("ike_malformed") if unknown is None else Reply(unknown, "ike_malformed")
        settings = self._settings
        spi = request.header.initiator_spi
        loaded = (0 < settings.cookie_threshold <= half_open) or (0 < settings.cookie_threshold_ip <= half_open_of_address)
        if loaded and (request.cookie is None or not self._cookies.check(request.cookie, request.nonce, remote.address, spi, now)):
            return Reply(cookie_reply(request, self._cookies.make(request.nonce, remote.address, spi, now)), "ike_cookies_sent")
        if 0 < settings.block_threshold <= half_open_of_address:
            return Refused("ike_blocked_address")
        if half_open >= settings.limit:
            return Refused("ike_half_open_limit")
        return Admitted()
