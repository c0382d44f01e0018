"""What requests hold, and what answers without data say. Keys and texts are strongSwan's (vici_control.c)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vpnd.config.reader import integer, is_no, shown
from vpnd.config.tree import Items, Scalar, Section
from vpnd.control.backend import ControlError

MAX_MESSAGE: Final = 4096  # characters of an errmsg
MAX_NEGATIVE: Final = 19  # characters of a number below 0, its sign included


def success() -> Section:
    return Section.of({"success": "yes"})


def failure(message: str) -> Section:
    return Section.of({"success": "no", "errmsg": message[:MAX_MESSAGE]})


def matched(verb: str, count: int) -> Section:
    """How many SAs an order met; with none it is refused."""
    answer = success() if count else failure(f"no matching SAs to {verb} found")
    return Section({"success": answer.entries["success"], "matches": Scalar(str(count).encode()), **answer.entries})


def terminated(matches: int, terminated: int, errmsg: str | None = None) -> Section:
    answer = Section.of({"success": "no" if errmsg else "yes", "matches": matches, "terminated": terminated})
    if errmsg:
        answer.entries["errmsg"] = Scalar(errmsg[:MAX_MESSAGE].encode())
    return answer


def name_list(key: str, names: Iterable[str]) -> Section:
    return Section({key: Items(tuple(Scalar(name.encode()) for name in names))})


def required(request: Section, key: str, message: str) -> str:
    value = request.text(key)
    if not value:
        raise ControlError(message)
    return value


def flag(request: Section, key: str) -> bool:
    """There, and not "no": strongSwan asks only whether some of these are there, and clients that mean no may say so."""
    text = request.text(key)
    return text is not None and not is_no(text.lower())


def number(request: Section, key: str, minimum: int = 0) -> int | None:
    """None when it is missing or 0, which ids never are. README.md of VICI spells some keys with an underscore."""
    text = request.text(key) or request.text(key.replace("-", "_"))
    if not text:
        return None
    try:
        value = int(text) if minimum < 0 and text.startswith("-") and text[1:].isdecimal() and len(text) <= MAX_NEGATIVE else integer(text)
    except ValueError:
        raise ControlError(f"'{key}': {shown(text)} is not a number") from None
    return value or None if key.endswith("-id") else value


def timeout_of(request: Section) -> float:
    """Seconds; 0 is none, less than 0 do not wait."""
    return (number(request, "timeout", -1) or 0) / 1000
