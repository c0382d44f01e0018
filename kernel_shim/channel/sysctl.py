"""Kernel settings of a network namespace that are ours for a while."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path("/proc/sys/net")  # of the calling thread's network namespace
NAMESPACE: Final = Path("/proc/thread-self/ns/net")
BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
MAX_FILE: Final = 65_536  # octets


class _Setting(NamedTuple):
    before: str
    ours: str


class Sysctls:
    """Sets values and remembers what to put back. Names are as below net/, `core/xfrm_larval_drop`.

    With a `file` what was there before outlives us: who is killed leaves it behind, and the next one that sets or restores takes it over.
    A file of another boot or network namespace tells nothing of this one and is passed over.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._before: dict[str, _Setting] = {}

    def get(self, name: str) -> str | None:
        """None when the kernel has no such setting."""
        try:
            return (ROOT / name).read_text().strip()
        except OSError:
            return None

    def set(self, name: str, value: str) -> bool:
        """Whether the setting now has this value."""
        self._take_over()
        before = self.get(name)
        if before is None:
            return False
        known = self._before.get(name)
        if known is not None and known.ours != before:
            known = None  # somebody else has set it meanwhile
        if before != value or known is not None:
            self._before[name] = _Setting(known.before if known is not None else before, value)
            self._write()  # first: who is killed between the two has told
        if before != value:
            try:
                (ROOT / name).write_text(value)
            except OSError:
                del self._before[name]
                self._write()
                return False
        return True

    def restore(self) -> None:
        """What somebody else has set meanwhile stays as it is."""
        self._take_over()
        for name, setting in self._before.items():
            with suppress(OSError):
                if self.get(name) == setting.ours:
                    (ROOT / name).write_text(setting.before)
        self._before.clear()
        self._write()

    # The file

    def _take_over(self) -> None:
        for name, setting in self._read().items():
            self._before.setdefault(name, setting)

    def _read(self) -> dict[str, _Setting]:
        if self._file is None:
            return {}
        try:
            with self._file.open("rb") as stream:
                told: Any = json.loads(stream.read(MAX_FILE))
            if told["namespace"] != _namespace():
                return {}
            return {name: _Setting(*map(str, values)) for name, values in told["settings"].items() if (ROOT / name).resolve().is_relative_to(ROOT)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # without it only who is killed leaves settings behind
            if not self._before:
                self._file.unlink(missing_ok=True)
                return
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new = self._file.with_name(self._file.name + ".new")
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                json.dump({"namespace": _namespace(), "settings": self._before}, stream)
            new.replace(self._file)


def _namespace() -> str:
    """This network namespace, until the host boots again."""
    return f"{BOOT.read_text().strip()} {NAMESPACE.stat().st_ino}"
