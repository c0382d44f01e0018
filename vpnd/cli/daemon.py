"""`vpnd`: run the key manager, or check a configuration."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import shtab

from vpnd.config import ConfigErrors, load
from vpnd.config.capabilities import EXPECTED, beyond
from vpnd.config.errors import ConfigError
from vpnd.config.label_tunnels import unprotected
from vpnd.config.model import KernelChoice, LoadedConfiguration
from vpnd.control.vici.formats import metadata_version
from vpnd.io.kernel_choice import choose
from vpnd.telemetry.wording import counted

DEFAULT_CONFIG: Final = Path("/etc/vpnd/vpnd.conf")

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line; completion and tests read it."""
    top = argparse.ArgumentParser(prog="vpnd", description="An IKEv2 key manager.")
    top.add_argument("--version", action="version", version=f"vpnd {metadata_version()}")
    shtab.add_argument_to(top, "--print-completion", help="print a completion script for a shell")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run until SIGTERM or SIGINT", description="Exit status 0 after an orderly stop, 1 when it could not start.")
    _file(run.add_argument("--config", "-c", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="the configuration (%(default)s)"))

    check = commands.add_parser(
        "check",
        help="say what is wrong with a configuration",
        description="Prints each complaint as FILE:LINE:COLUMN: OPTION: MESSAGE. Exit status 0 when there is none, else 1.",
    )
    _file(check.add_argument("file", type=Path, nargs="?", default=DEFAULT_CONFIG, metavar="FILE", help="the configuration (%(default)s)"))
    return top


def _file(action: argparse.Action) -> None:
    action.complete = shtab.FILE  # type: ignore[attr-defined]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: could not, or complaints; 2: asked wrongly."""
    options = parser().parse_args(arguments)
    if options.command == "check":
        return _check(options.file)
    from vpnd.app import run  # everything of the daemon: not for `check`

    return run(options.config)


def _check(path: Path) -> int:
    try:
        loaded = load(path)
    except ConfigErrors as invalid:
        return _complain(invalid.errors)
    for warning in loaded.warnings:
        print(f"{warning} (warning)", file=sys.stderr)
    if loaded.daemon.kernel is KernelChoice.AUTO:
        verdicts = asyncio.run(choose(loaded.daemon, loaded.configuration))
        for verdict in verdicts:
            print(f"{path}: kernel = auto: {verdict}", file=sys.stdout if verdict.usable else sys.stderr)
        if not verdicts[-1].usable:
            return EXIT_FAILED
    elif complaints := beyond(loaded.configuration, EXPECTED[loaded.daemon.kernel], loaded.tree):
        return _complain(complaints)
    if complaints := unprotected(loaded.configuration, loaded.tree):
        return _complain(complaints)
    print(f"{path}: ok, {_summary(loaded)}")
    return EXIT_OK


def _complain(errors: Sequence[ConfigError]) -> int:
    for error in errors:
        print(error, file=sys.stderr)
    return EXIT_FAILED


def _summary(loaded: LoadedConfiguration) -> str:
    configuration = loaded.configuration
    parts = [
        counted(len(configuration.connections), "connection"),
        counted(sum(len(connection.children) for connection in configuration.connections.values()), "child", "children"),
        counted(len(configuration.shared), "shared secret"),
        counted(len(configuration.private_keys), "private key"),
        counted(len(configuration.certificates), "certificate"),
        counted(len(configuration.authorities), "authority", "authorities"),
    ]
    if configuration.mpls:
        parts.append(counted(len(configuration.mpls.vrfs), "VRF"))
    return ", ".join([*parts, f"kernel {loaded.daemon.kernel.value}"])


if __name__ == "__main__":
    sys.exit(main())
