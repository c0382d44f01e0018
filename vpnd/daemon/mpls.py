"""What the `mpls` section says becomes what should stand in the kernel; the labels that were given are kept over restarts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import structlog

from kernel_shim.mpls.allocator import LabelsExhausted
from kernel_shim.mpls.labels import FIRST_LABEL, LAST_LABEL, Label
from vpnd.control.backend import ControlError
from vpnd.daemon.label_synchroniser import STATIC, LabelSynchroniser
from vpnd.mpls.model import MplsConfig
from vpnd.mpls.plan import Assignment, assign, entries

MAX_FILE: Final = 64 << 20  # octets; as many names as there are labels

log = structlog.get_logger("mpls")


class Mpls:
    """`label_file` remembers what each label was given for; a label follows from its name in most cases, so a lost file costs little."""

    def __init__(self, labels: LabelSynchroniser, label_file: Path | None = None) -> None:
        self.labels: Final = labels
        self._file = label_file
        self.config = MplsConfig()
        self.given: Assignment = _read(label_file) if label_file is not None else {}

    def plan(self, config: MplsConfig) -> Assignment:
        """The labels that it would have. Raises ControlError when they do not suffice; nothing has changed."""
        try:
            return assign(config, self.given)
        except LabelsExhausted as error:
            raise ControlError(f"mpls.label_range: {error}") from error

    def load(self, config: MplsConfig) -> int:
        """From now on this counts; how many entries of the label node differ from before. ControlError as `plan`."""
        given = self.plan(config)
        if given != self.given:
            self.given = given
            self._remember()
        self.config = config
        return self.labels.replace(STATIC, entries(config, given))

    def _remember(self) -> None:
        if self._file is None:
            return
        temporary = self._file.with_name(self._file.name + ".new")
        try:
            temporary.write_text(json.dumps(self.given))
            os.replace(temporary, self._file)
        except OSError as error:
            log.warning("labels not remembered", file=str(self._file), reason=error.strerror)


def _read(path: Path) -> dict[str, Label]:
    try:
        with path.open() as file:
            found = json.loads(file.read(MAX_FILE))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("labels of an earlier run not read", file=str(path), reason=str(error))
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: Label(label) for name, label in found.items() if isinstance(label, int) and FIRST_LABEL <= label <= LAST_LABEL}
