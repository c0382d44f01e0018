"""The process of the userspace kernel: one loop around the data plane, the PF_KEY server, the TUN and the sockets."""

from __future__ import annotations

from kernel_shim.io.settings import ShimSettings


def serve(settings: ShimSettings, log_level: str = "info") -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    raise NotImplementedError
