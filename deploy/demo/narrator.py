"""Tells a person what happens, in colour where the terminal has it."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

PICTURE: Final = r"""
  host A            gateway A              gateway B            host B
  10.1.0.10 ------- 192.0.2.1 ==ESP in UDP== 192.0.2.2 ------- 10.2.0.10
"""


class Narrator:
    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def title(self, text: str) -> None:
        self._console.print(Rule(f"[bold]{escape(text)}"))
        self._console.print(Text(PICTURE, style="cyan"))

    def step(self, text: str) -> None:
        self._console.print(f"[bold blue]{self.seconds:5.1f} s[/]  [bold]{escape(text)}[/]")

    def tell(self, text: str) -> None:
        self._console.print(Padding(f"[green]+[/] {escape(text)}", (0, 0, 0, 9)))

    def show(self, output: str) -> None:
        """What a command printed."""
        for line in output.rstrip().splitlines():
            self._console.print(Padding(Text.from_ansi(line, style="dim", no_wrap=True, overflow="crop"), (0, 0, 0, 9)))

    def end(self, text: str, *, good: bool) -> None:
        self._console.print(f"[bold {'green' if good else 'red'}]demo: {escape(text)}[/]", soft_wrap=True)
