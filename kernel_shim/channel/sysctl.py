"""Kernel settings of a network namespace that are ours for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path("/proc/sys/net")  # of the calling thread's network namespace


class Sysctls:
    """Sets values and remembers what to put back. Names as below net/, `core/xfrm_larval_drop`."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[str, str]] = {}

    def get(self, name: str) -> str | None:
        """None when the kernel has no such setting."""
        try:
            return (ROOT / name).read_text().strip()
        except OSError:
            return None

    def set(self, name: str, value: str) -> bool:
        """Whether the setting now has this value."""
        path = ROOT / name
        try:
            before = path.read_text().strip()
            if before != value:
                path.write_text(value)
                self._before.setdefault(name, (before, value))
        except OSError:
            return False
        return True

    def restore(self) -> None:
        """What somebody else has set meanwhile stays as it is."""
        for name, (before, ours) in self._before.items():
            path = ROOT / name
            try:
                if path.read_text().strip() == ours:
                    path.write_text(before)
            except OSError:
                continue
        self._before.clear()
