"""Lifetimes of IKE and CHILD_SAs, their defaults as swanctl.conf(5) has them, and the bounds that keep an SA from being rekeyed without end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vpnd.config.reader import MAX_OCTETS, Reader, integer

DEFAULT_CHILD_REKEY: Final = 3600.0  # s
DEFAULT_IKE_REKEY: Final = 14400.0  # s
SMALLEST_REKEY_BYTES: Final = 1 << 16  # an SA that a few packets wear out is nothing but rekeying
SMALLEST_REKEY_PACKETS: Final = 64
SMALLEST_OVER: Final = 1.0  # s, of those that follow from other options
SMALLEST_DIFFERENCE: Final = 1  # s, between rekeying and end of a CHILD_SA, where the one follows from the other


@dataclass(frozen=True, slots=True)
class ChildLifetime:
    """Soft, hard and random part in one unit; 0 is off."""

    rekey: float
    life: float
    rand: float


@dataclass(frozen=True, slots=True)
class IkeLifetime:
    """Seconds; 0 is off."""

    rekey: float
    reauth: float
    over: float
    rand: float


def child_lifetimes(reader: Reader) -> tuple[ChildLifetime, ChildLifetime, ChildLifetime]:
    """In seconds, bytes and packets."""
    return (
        _of_child(reader, "time", lambda option: reader.seconds(option, None), DEFAULT_CHILD_REKEY, 0),
        _of_child(reader, "bytes", lambda option: reader.octets(option, None), 0, SMALLEST_REKEY_BYTES),
        _of_child(reader, "packets", lambda option: reader.convert(option, None, _packets), 0, SMALLEST_REKEY_PACKETS),
    )


def _of_child(reader: Reader, unit: str, read: Callable[[str], float | None], default: float, smallest: int) -> ChildLifetime:
    """Each missing one follows from the others."""
    rekey, life, rand = read(f"rekey_{unit}"), read(f"life_{unit}"), read(f"rand_{unit}")
    given = "rekey" if rekey else "life"
    if rekey is None:
        rekey = default if life is None else int(life) * 10 // 11
    if life is None:
        life = min(max(int(rekey) * 11 // 10, int(rekey) + SMALLEST_DIFFERENCE), MAX_OCTETS) if rekey else 0
    elif 0 < life <= rekey:
        reader.complain(f"life_{unit} is not more than rekey_{unit}: the SA would go before its successor comes", f"life_{unit}")
    if rand is None:
        rand = min(life - min(life, rekey), int(rekey) // 2) if rekey else life - min(life, rekey)
    elif rekey and rand > rekey:
        reader.complain(f"rand_{unit} is more than rekey_{unit}: the SA could be due as soon as it stands", f"rand_{unit}")
    if 0 < (rekey or life) < smallest:
        reader.complain(f"an SA of fewer than {smallest} {unit} would be rekeyed without end", f"{given}_{unit}")
    return ChildLifetime(float(rekey) if unit == "time" else rekey, float(life) if unit == "time" else life, float(rand) if unit == "time" else rand)


def ike_lifetime(reader: Reader) -> IkeLifetime:
    """Each missing one follows from the others: without rekeying and reauthentication, there is rekeying."""
    rekey, reauth, over, rand = (reader.seconds(f"{which}_time", None) for which in ("rekey", "reauth", "over", "rand"))
    if rekey is None:
        rekey = DEFAULT_IKE_REKEY if reauth is None else 0.0
    reauth = reauth or 0.0
    longest = max(rekey, reauth)
    if over is None:
        over = max(SMALLEST_OVER, float(int(longest / 10))) if longest else 0.0
    elif not over and longest:
        reader.complain("without over_time the IKE SA would be deleted just when it is to be replaced", "over_time")
    if rand is None:
        rand = min(over, longest / 2)
    else:
        for which, time in (("rekey", rekey), ("reauth", reauth)):
            if time and rand > time:
                reader.complain(f"rand_time is more than {which}_time: the IKE SA could be due as soon as it stands", "rand_time")
    return IkeLifetime(rekey, reauth, over, rand)


def _packets(text: str) -> int:
    return integer(text, 0, MAX_OCTETS)
