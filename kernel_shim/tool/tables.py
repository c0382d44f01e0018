"""Reports as tables for people. What a kernel tells is shown as text, never as markup."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]

WIDTH_OF_A_FILE: Final = 240  # columns when the output is no terminal: nothing is cut off there
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def sad(rows: Sequence[Report]) -> None:
    table = _table("SPI", "dir", "state", "source", "destination", "mode", "reqid", "algorithm", "selectors", "traffic", "used")
    for row in rows:
        ports = row["encapsulation"]
        _add(
            table,
            *(row["spi"], row["direction"], row["state"]),
            *(_end(row, "source", ports), _end(row, "destination", ports), row["mode"], row["reqid"]),
            f"{row['algorithm'] or '-'}{' esn' if row['esn'] else ''}",
            f"{', '.join(row['source_selectors']) or 'any'} => {', '.join(row['destination_selectors']) or 'any'}",
            f"{row['packets']:,} packets, {_octets(row['octets'])}",
            row["used"] or "never",
        )
    _print(table, "no SAs")


def _end(row: Report, side: str, ports: Report | None) -> str:
    return f"{row[side]}[{ports[f'{side}_port']}]" if ports else str(row[side])


def spd(rows: Sequence[Report]) -> None:
    table = _table("index", "dir", "action", "priority", "selector", "template", "unresolved")
    for row in rows:
        templates = [f"{it['mode']} {it['source'] or 'any'} => {it['destination'] or 'any'} reqid {it['reqid']} {it['level']}" for it in row["templates"]]
        more = [f"if_id {row['if_id']}"] if row["if_id"] else []
        more += [f"mark {row['mark']}"] if row["mark"] else []
        unresolved = row["unresolved"] if row["direction"] == "out" and row["action"] == "protect" else ""
        _add(table, row["index"], row["direction"], row["action"], row["priority"], " ".join((row["selector"], *more)), "\n".join(templates), unresolved)
    _print(table, "no policies")


def pending(rows: Sequence[Report]) -> None:
    table = _table("policy", "selector", "source", "destination", "acquire", "mode", "flows", "packets", "octets")
    for row in rows:
        _add(
            table,
            *(row["policy"], row["selector"] or "", row["source"] or "any", row["destination"] or "any", row["acquire"] or "-"),
            *(row["unresolved"], row["flows"], f"{row['segments']:,}", _octets(row["octets"])),
        )
    _print(table, "no packets wait")


def bundles(rows: Sequence[Report]) -> None:
    table = _table("VRF", "source", "destination", "protocol", "action", "labels", "policy", "SA", "limit")
    for row in rows:
        sa = row["sa"]
        labels = f"{' '.join(map(str, row['labels']))} to {row['peer']}".strip() if row["peer"] else ""
        _add(
            table,
            *(row["vrf"] or "", _side(row, "source"), _side(row, "destination"), _or_any(row["protocol"]), row["action"], labels),
            *(row["selector"] or row["policy"] or "none", f"{sa['spi']} to {sa['destination']}" if sa else "", row["limit"] or ""),
        )
    _print(table, "the cache is empty")


def labels(rows: Sequence[Report]) -> None:
    table = _table("kind", "name", "what")
    for row in rows:
        _add(table, row["kind"], row["name"], row["what"])
    _print(table, "no labels")


def _side(row: Report, side: str) -> str:
    port = row[f"{side}_port"]
    return f"{_or_any(row[side])}{f'[{port}]' if port is not None else ''}"


def _or_any(value: object) -> str:
    return "any" if value is None else str(value)


def stats(rows: Sequence[Report]) -> None:
    table = _table("counter", "value")
    table.columns[1].justify = "right"
    for row in rows:
        _add(table, row["counter"], f"{row['value']:,}")
    _print(table, "no counters")


TABLES: Final[Mapping[str, Callable[[Sequence[Report]], None]]] = {
    "sad": sad,
    "spd": spd,
    "pending": pending,
    "bundles": bundles,
    "labels": labels,
    "stats": stats,
}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(Text(str(cell)) for cell in cells))


def _print(table: Table, none: str) -> None:
    if not table.row_count:
        print(none)
        return
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_FILE)
    console.print(table)


def _octets(count: float) -> str:
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""
