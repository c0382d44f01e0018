"""structlog set-up of both daemons: one line an event on stderr, and no key material in it, whatever a caller passes."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from kernel_shim.secret import Secret


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace values that may be key material: bytes and `Secret`s show their length only."""
    for key, value in event.items():
        if isinstance(value, Secret | bytes | bytearray | memoryview):
            event[key] = f"<{len(value)} bytes>"
    return event


def configure_logs(level: str = "info", style: str = "console") -> None:
    """`level` is a name of the logging module in lower case; `style` is `console` (key=value) or `json`."""
    text = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
    renderer: Any = structlog.processors.JSONRenderer() if style == "json" else text
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping().get(level.upper(), logging.INFO)),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
