"""The subcommands that look at a kernel: their grammar and how they run."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

from kernel_shim.model import KernelError
from kernel_shim.tool import reports
from kernel_shim.tool.sources import KERNELS, opened, opened_inspectable, opened_labels

Report = reports.Report

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130


async def _sad(options: argparse.Namespace) -> list[Report]:
    async with opened(options.kernel, options.socket) as source:
        return [reports.sa(status) for status in await source.sas()]


async def _spd(options: argparse.Namespace) -> list[Report]:
    async with opened(options.kernel, options.socket) as source:
        return [reports.policy(policy) for policy in await source.policies()]


async def _pending(options: argparse.Namespace) -> list[Report]:
    async with opened_inspectable(options.kernel, options.socket) as source:
        queues = await source.pending_queues()
        selectors = reports.outbound_selectors(await source.policies())
    return [reports.pending(queue, selectors) for queue in queues]


async def _bundles(options: argparse.Namespace) -> list[Report]:
    async with opened_inspectable(options.kernel, options.socket) as source:
        bundles = await source.cached_bundles()
        selectors = reports.outbound_selectors(await source.policies())
    return [reports.bundle(bundle, selectors) for bundle in bundles]


async def _labels(options: argparse.Namespace) -> list[Report]:
    async with opened_labels(options.kernel, options.socket) as source:
        return [reports.label_entry(entry) for entry in await source.labels()]


async def _stats(options: argparse.Namespace) -> list[Report]:
    async with opened(options.kernel, options.socket) as source:
        return [{"counter": name, "value": value} for name, value in sorted((await source.statistics()).items())]


_QUESTIONS: Final[Mapping[str, tuple[str, Callable[[argparse.Namespace], Coroutine[Any, Any, list[Report]]]]]] = {
    "sad": ("show the security associations", _sad),
    "spd": ("show the policies", _spd),
    "pending": ("show the packets that wait for an SA, by policy and peer", _pending),
    "bundles": ("show the bundle cache: what becomes of the flows of late", _bundles),
    "labels": ("show VRFs, tunnels, peers, labels and the routes of VRFs", _labels),
    "stats": ("show the counters of a running kernel", _stats),
}
NAMES: Final = (*_QUESTIONS, "monitor")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], add_socket: Callable[[argparse.ArgumentParser], None]) -> None:
    """`add_socket` gives a command its `--socket`."""
    for name in NAMES:
        text = _QUESTIONS[name][0] if name in _QUESTIONS else "show every message between a kernel and its key managers, as it passes"
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_socket(command)
        command.add_argument("--kernel", choices=tuple(KERNELS), default="userspace", help="which kernel to look at (%(default)s)")
        command.add_argument("--json", action="store_true", help="one JSON object a line" if name == "monitor" else "as JSON")


def run(options: argparse.Namespace) -> int:
    """Exit status 0: done; 1: could not, and why is on stderr."""
    try:
        return _monitor(options) if options.command == "monitor" else _show(options)
    except KernelError as error:
        return _failed(error.detail)
    except BrokenPipeError:
        sys.stderr.close()  # else Python complains once more at its end
        return EXIT_FAILED
    except ConnectionResetError as error:
        return _failed(str(error))
    except OSError as error:
        where = f" at {options.socket}" if options.kernel == "userspace" else ""
        return _failed(f"no kernel answers{where}: {error.strerror or error}")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _failed(why: str) -> int:
    print(f"kernel-shim: {why}", file=sys.stderr)
    return EXIT_FAILED


def _show(options: argparse.Namespace) -> int:
    rows = asyncio.run(_QUESTIONS[options.command][1](options))
    if options.json:
        print(json.dumps({row["counter"]: row["value"] for row in rows} if options.command == "stats" else rows))
        return EXIT_OK
    from kernel_shim.tool.tables import TABLES

    TABLES[options.command](rows)
    return EXIT_OK


def _monitor(options: argparse.Namespace) -> int:
    connect = KERNELS[options.kernel].messages
    if connect is None:
        return _failed(f"the kernel {options.kernel} has no PF_KEY messages to show; try `ip xfrm monitor`")
    from kernel_shim.tool.monitor import monitor

    monitor(connect(Path(options.socket)), doubled=options.kernel == "pfkey", as_json=options.json, show=lambda line: print(line, flush=True))
    return EXIT_OK
