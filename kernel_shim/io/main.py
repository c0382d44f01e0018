"""`kernel-shim`: the userspace kernel's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kernel_shim.io import settings
from kernel_shim.io.settings import ShimSettings
from kernel_shim.tool import commands as tool


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line; completion and tests read it."""
    top = argparse.ArgumentParser(prog="kernel-shim", description="An IPsec kernel in user space, spoken to over PF_KEY.")
    commands = top.add_subparsers(dest="command", required=True)

    serve = commands.add_parser(
        "serve",
        help="run the kernel until SIGTERM",
        description="Needs /dev/net/tun, CAP_NET_ADMIN, and CAP_NET_BIND_SERVICE (or ip_unprivileged_port_start) for UDP 500.",
    )
    _socket_argument(serve)
    serve.add_argument("--tun", default=settings.DEFAULT_TUN, help="interface name, at most 9 letters (%(default)s)")
    serve.add_argument("--mtu", type=int, help="MTU of the interface; default: what fits --egress-mtu with AES-GCM in UDP over IPv4")
    serve.add_argument("--egress-mtu", type=int, default=settings.DEFAULT_EGRESS_MTU, help="MTU towards the peers (%(default)s)")
    serve.add_argument("--table", type=int, default=settings.DEFAULT_TABLE, help=f"first of {settings.TABLES} routing tables of our own (%(default)s)")
    serve.add_argument("--rule-priority", type=int, default=settings.DEFAULT_RULE_PRIORITY, help="first priority of our routing rules (%(default)s)")
    serve.add_argument("--mark", type=_mark, default=settings.DEFAULT_MARK, help="mark of our own packets (0x%(default)x)")
    serve.add_argument("--ready-fd", type=int, help="write a line to this descriptor, and close it, when the socket listens")
    serve.add_argument("--keep-privileges", action="store_true", help="do not drop capabilities (to profile it, for example)")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")

    tool.add_commands(commands, _socket_argument)
    return top


def _socket_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--socket", type=Path, default=settings.DEFAULT_SOCKET, help="PF_KEY socket (%(default)s)")


def _mark(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, such as 0x49500000") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: could not; 2: asked wrongly."""
    top = parser()
    options = top.parse_args(arguments)
    if options.command in tool.NAMES:
        return tool.run(options)
    try:
        chosen = ShimSettings(
            socket=options.socket,
            tun=options.tun,
            mtu=options.mtu if options.mtu is not None else settings.tunnel_mtu(options.egress_mtu),
            egress_mtu=options.egress_mtu,
            table=options.table,
            rule_priority=options.rule_priority,
            mark=options.mark,
            ready_descriptor=options.ready_fd,
            keep_privileges=options.keep_privileges,
        )
    except ValueError as error:
        top.error(str(error))
    from kernel_shim.io.shim import serve  # the data plane takes a while to import: not for the commands that look

    return serve(chosen, options.log_level)


if __name__ == "__main__":
    sys.exit(main())
