"""The file system that a foreign program runs in: this machine's, or that of a newer Debian, unpacked by `.ci/newer-debian`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HERE: Final = 'mount -t tmpfs tmpfs /run && exec "$@"'
# /dev, /proc and /sys are those of the caller, who has a mount namespace of his own.
_BELOW: Final = """
set -e
mount -t tmpfs tmpfs "$0/run"
mount -t tmpfs tmpfs "$0/tmp"
mkdir -p "$0$1"
mount --bind "$1" "$0$1"
for folder in dev proc sys; do mount --rbind "/$folder" "$0/$folder"; done
root=$0
shift
exec chroot "$root" "$@"
"""


@dataclass(frozen=True, slots=True)
class Root:
    """Programs and libraries below `path`."""

    path: Path

    def file(self, path: Path) -> Path:
        """Where the file is seen from outside."""
        return self.path / path.relative_to("/")

    def argv(self, shared: Path, argv: Sequence[str]) -> list[str]:
        """The vector that runs `argv` there with a /run of its own; the pid stays the program's. `shared`: the folder that is there, too, under the same name.

        To be run in a mount namespace of its own, as `Namespace` does.
        """
        if self.path == Path("/"):
            return ["sh", "-c", _HERE, "sh", *argv]
        return ["sh", "-c", _BELOW, str(self.path), str(shared), *argv]


HOST: Final = Root(Path("/"))
NEWER: Final = Root(Path(__file__).resolve().parents[2] / "build" / "peers" / "root")


def newer_peers() -> str:
    """What the newer Debian's peers are, for a head line: that Debian moves on, and so may their conduct."""
    try:
        lines = (NEWER.path.parent / "versions").read_text().splitlines()
    except OSError:
        return "none"
    versions = dict(line.split("\t") for line in lines)
    return ", ".join(f"{name} {versions[name]}" for name in ("strongswan-charon", "libreswan") if name in versions)
