"""sd_notify(3): tells the service manager, or whoever started us, that we are ready."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send one state line to $NOTIFY_SOCKET; without one, or when nobody reads it, nothing happens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            return
