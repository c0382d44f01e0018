"""The top-level `vpnd` section to `DaemonConfig`."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from kernel_shim.model import IPAddress
from vpnd.config import options
from vpnd.config.errors import ConfigError
from vpnd.config.model import DaemonConfig, KernelChoice, LogFormat
from vpnd.config.reader import Reader, account, integer, shown
from vpnd.config.tree import Section
from vpnd.ike.fragments import SMALLEST_PACKET

MAX_SOCKET_PATH: Final = 107  # bytes of sun_path without its NUL (unix(7))
MAX_LISTEN: Final = 1024
_LEVELS: Final = ("debug", "info", "warning", "error")


def validate_daemon(section: Section, errors: list[ConfigError], path: str = "vpnd") -> DaemonConfig:
    """Complaints go to `errors`; what is wrong has its default in the result."""
    reader = Reader(section, path, errors)
    defaults = DaemonConfig()
    reader.not_implemented(options.DAEMON)
    daemon = DaemonConfig(
        kernel=reader.convert("kernel", defaults.kernel, _kernel),
        shim_socket=reader.convert("shim_socket", defaults.shim_socket, _socket),
        start_shim=reader.boolean("start_shim", defaults.start_shim),
        control_socket=reader.convert("control_socket", defaults.control_socket, _socket),
        control_mode=reader.convert("control_mode", defaults.control_mode, _mode),
        control_owner=reader.convert("control_owner", None, account),
        control_group=reader.convert("control_group", None, account),
        listen=tuple(dict.fromkeys(reader.convert_all("listen", _listen))),
        log_level=reader.choice("log_level", defaults.log_level, {level: level for level in _LEVELS}),
        log_format=reader.choice("log_format", defaults.log_format, {form.value: form for form in LogFormat}),
        cookie_threshold=reader.integer("cookie_threshold", defaults.cookie_threshold),
        cookie_threshold_ip=reader.integer("cookie_threshold_ip", defaults.cookie_threshold_ip),
        block_threshold=reader.integer("block_threshold", defaults.block_threshold),
        half_open_limit=reader.integer("half_open_limit", defaults.half_open_limit, minimum=1, maximum=1_000_000),
        half_open_timeout=_positive(reader, "half_open_timeout", defaults.half_open_timeout),
        keep_alive=reader.seconds("keep_alive", defaults.keep_alive) or 0.0,
        retransmit_timeout=reader.convert("retransmit_timeout", defaults.retransmit_timeout, lambda text: _decimal(text, 0.05, 600)),
        retransmit_base=reader.convert("retransmit_base", defaults.retransmit_base, lambda text: _decimal(text, 1, 10)),
        retransmit_tries=reader.integer("retransmit_tries", defaults.retransmit_tries, minimum=1, maximum=20),
        retransmit_limit=reader.convert("retransmit_limit", defaults.retransmit_limit, lambda text: _decimal(text, 0, 600)),
        make_before_break=reader.boolean("make_before_break", defaults.make_before_break),
        inactivity_close_ike=reader.boolean("inactivity_close_ike", defaults.inactivity_close_ike),
        shutdown_timeout=reader.convert("shutdown_timeout", defaults.shutdown_timeout, lambda text: _decimal(text, 0, 600)),
        state_dir=reader.convert("state_dir", defaults.state_dir, _directory),
        follow_redirects=reader.boolean("follow_redirects", defaults.follow_redirects),
        crash_detection=reader.boolean("crash_detection", defaults.crash_detection),
        fragment_size=reader.convert("fragment_size", defaults.fragment_size, _fragment_size),
    )
    if len(daemon.listen) > MAX_LISTEN:
        reader.complain(f"more than {MAX_LISTEN} addresses", "listen")
    reader.finish(list(options.DAEMON))
    return daemon


def _kernel(text: str) -> KernelChoice:
    try:
        return KernelChoice(text.lower())
    except ValueError:
        raise ValueError(f"'{shown(text)}' is not one of {', '.join(choice.value for choice in KernelChoice)}") from None


def _socket(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or not text.isprintable() or len(text.encode()) > MAX_SOCKET_PATH:
        raise ValueError(f"'{shown(text)}' is not an absolute path of at most {MAX_SOCKET_PATH} bytes")
    return path


def _mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError(f"'{shown(text)}' is not a file mode, such as 0660")
    return int(text, 8)


def _listen(text: str) -> IPAddress:
    try:
        address = ip_address(text)
    except ValueError:
        raise ValueError(f"'{shown(text)}' is not an address") from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"'{shown(text)}' is not the address of a host")
    return address


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or not text.isprintable():
        raise ValueError(f"'{shown(text)}' is not an absolute path")
    return path


def _fragment_size(text: str) -> int:
    size = integer(text, 0, 65535)
    if 0 < size < SMALLEST_PACKET[4]:
        raise ValueError(f"{size} is less than the {SMALLEST_PACKET[4]} octets that every path carries; 0 is the smallest of each address family")
    return size


def _positive(reader: Reader, option: str, default: float) -> float:
    value = reader.seconds(option, default) or 0.0
    if not value:
        reader.complain("a time above 0 was expected", option)
    return value


def _decimal(text: str, minimum: float, maximum: float) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError(f"'{shown(text)}' is not a number")
    value = float(text)
    if not minimum <= value <= maximum:
        raise ValueError(f"{text} is not within {minimum} to {maximum}")
    return value
