"""A PF_KEY message in words: as plain values for JSON, and on one line. Whatever holds a key shows its length and nothing else."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Final

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.model import Endpoint, Flow, SaId, SaState, Selector, TrafficSelector
from kernel_shim.pfkey.constants import AuthAlgorithm, EncryptAlgorithm, SaType
from kernel_shim.pfkey.messages import (
    Address,
    Extension,
    IpsecRequest,
    Key,
    LifetimeExtension,
    Message,
    Proposal,
    Sa,
    Supported,
    UnknownExtension,
    message_name,
)
from kernel_shim.pfkey.private import CapabilitiesExtension
from kernel_shim.secret import Secret
from kernel_shim.tool import reports

_SPECIAL_FIELDS: Final = frozenset({"type"})
MAX_TEXT: Final = 200  # characters of a message's own text on a line


def as_values(message: Message) -> dict[str, Any]:
    """For JSON."""
    return {
        "type": message_name(message.type),
        "sa_type": _enum_name(SaType, message.sa_type),
        "errno": errno.errorcode.get(message.errno, message.errno) if message.errno else None,
        "seq": message.sequence,
        "pid": message.pid,
        "extensions": {name_of(extension): _extension(extension) for extension in message.extensions},
    }


def as_line(message: Message) -> str:
    """`ADD ESP seq 7 pid 42: SA(spi=00001000 ...) ADDRESS_SRC(192.0.2.1) ...`."""
    words = [message_name(message.type)]
    if message.sa_type:
        words.append(_enum_name(SaType, message.sa_type))
    words.append(f"seq {message.sequence} pid {message.pid}" if message.pid else f"seq {message.sequence} from the kernel")
    if message.errno:
        words.append(f"errno {errno.errorcode.get(message.errno, message.errno)}")
    parts = [f"{name_of(extension)}({_text(_extension(extension))})" for extension in message.extensions]
    return f"{' '.join(words)}: {' '.join(parts)}" if parts else " ".join(words)


def name_of(extension: Extension) -> str:
    if isinstance(extension, UnknownExtension):
        return f"EXTENSION_{extension.number}"
    return str(extension.type.name)  # type: ignore[attr-defined]


def _extension(extension: Extension) -> Any:
    if isinstance(extension, UnknownExtension):
        return {"octets": len(extension.body)}
    if isinstance(extension, Key):
        return {"bits": extension.bits}
    if isinstance(extension, Address):
        return _address(extension)
    if isinstance(extension, Sa):
        return {
            "spi": f"{extension.spi:08x}",
            "replay": extension.replay,
            "state": _enum_name(SaState, extension.state),
            "auth": _enum_name(AuthAlgorithm, extension.auth),
            "encrypt": _enum_name(EncryptAlgorithm, extension.encrypt),
            "flags": extension.flags,
        }
    if isinstance(extension, LifetimeExtension):
        return _values(extension)
    # Long lists of what a kernel could do, in each ACQUIRE and REGISTER: how many is enough.
    if isinstance(extension, Proposal):
        return {"combinations": len(extension.combinations)}
    if isinstance(extension, Supported):
        return {"algorithms": len(extension.algorithms)}
    if isinstance(extension, CapabilitiesExtension):
        return {"name": extension.capabilities.name, "algorithms": len(extension.capabilities.algorithms)}
    return _values(extension)


def _address(it: Address) -> str:
    prefix = f"/{it.prefix_length}" if it.prefix_length != it.address.max_prefixlen else ""
    port = f"[{it.port}]" if it.port else ""
    protocol = f" proto {it.protocol}" if it.protocol not in (0, 255) else ""
    return f"{it.address}{prefix}{port}{protocol}"


def _values(it: Any) -> dict[str, Any]:
    return {field.name: _value(getattr(it, field.name)) for field in fields(it) if field.name not in _SPECIAL_FIELDS}


def _value(value: Any) -> Any:
    if isinstance(value, Secret):
        return f"<{len(value)} octets>"
    if isinstance(value, EspAlgorithm):
        return reports.algorithm(value)
    if isinstance(value, Enum):
        return value.name.lower()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, SaId):
        return f"{value.spi:08x} to {value.destination}"
    if isinstance(value, Selector | TrafficSelector | Flow | Endpoint):
        return str(value)
    if isinstance(value, tuple | list | frozenset):
        return [_value(item) for item in value]
    if isinstance(value, IpsecRequest) or is_dataclass(value):
        return _values(value)
    return str(value)


def _enum_name(kind: type[Any], number: int) -> str:
    try:
        return str(kind(number).name)
    except ValueError:
        return str(number)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_nested(item)}" for name, item in _told(value))
    return _nested(value)


def _nested(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_text(value)})"
    if isinstance(value, list):
        return "[" + ", ".join(_nested(item) for item in value) + "]"
    return printable(str(value))[:MAX_TEXT]


def _told(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is not there, or zero, is not worth a word."""
    return ((name, value) for name, value in values.items() if value or value is False)


def printable(text: str) -> str:
    """No control character reaches a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
