"""`python -m bench [--rows a,b] [--output FILE]`: run the rows, print the table, write the JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.rows import Row, machine

# Group -> module; the names of its rows begin with the group's.
GROUPS: Final = {
    "first-packet": "bench.first_packet",
    "tcp-throughput": "bench.tcp_throughput",
    "pending-burst": "bench.pending_burst",
    "spd-scale": "bench.spd_scale",
    "dataplane": "bench.dataplane_micro",
    "pfkey-dump": "bench.pfkey_dump",
    "acquire-storm": "bench.acquire_storm",
    "channel-drift": "bench.channel_drift",
    "rekey-under-load": "bench.rekey_under_load",
    "gateway-hour": "bench.gateway_hour",
    "kernel-hold": "bench.kernel_hold",
    "shim-restart": "bench.shim_restart",
    "lfib-scale": "bench.lfib_scale",
    "mpls-throughput": "bench.mpls_throughput",
}


def chosen_groups(names: Sequence[str]) -> list[str]:
    """The groups that hold the rows `names` (names or beginnings); all for none. ValueError for a name that fits none."""
    for name in names:
        if not any(name.startswith(group) for group in GROUPS):
            raise ValueError(f"no such row: {name} (rows begin with {', '.join(GROUPS)})")
    return [group for group in GROUPS if not names or any(name.startswith(group) for name in names)]


def measure(group: str) -> list[dict[str, Any]]:
    """Its rows as the JSON has them; one without a figure when it could not be measured."""
    try:
        rows = importlib.import_module(GROUPS[group]).run()
    except Exception as error:
        traceback.print_exc()
        first_line = str(error).partition("\n")[0][:80]
        rows = [Row(group, "", "high", None, note=f"not measured: {type(error).__name__}: {first_line}")]
    return [row.as_json() if isinstance(row, Row) else {"machine": machine(), "note": "", **row} for row in rows]


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(title=machine(), title_justify="left")
    for name, justify in (("row", "left"), ("unit", "left"), ("ours", "right"), ("peer", "right"), ("ratio", "right"), ("floor", "right"), ("aim", "right")):
        shown.add_column(name, justify=justify)  # type: ignore[arg-type]
    shown.add_column("met")
    shown.add_column("note")
    for row in rows:
        sign = ">=" if row["better"] == "high" else "<="
        marks = [f"{sign} {_figure(row[mark])}" if row[mark] is not None else "-" for mark in ("floor", "aim")]
        figures = [_figure(row[name]) for name in ("ours", "peer", "ratio")]
        shown.add_row(row["name"], row["unit"], *figures, *marks, "[green]yes" if row["met"] else "[red]NO", row["note"])
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a row could not be measured; a floor that is missed is shown, not punished, for machines differ."""
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--rows", default="", help="names of rows, or their beginnings, with commas")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args(arguments)
    names = [name for name in options.rows.split(",") if name]
    try:
        groups = chosen_groups(names)
    except ValueError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = []
    for group in groups:
        begin = time.monotonic()
        print(f"{group} ...", end=" ", file=sys.stderr, flush=True)
        measured = measure(group)
        rows += [row for row in measured if not names or row["ours"] is None or any(row["name"].startswith(name) for name in names)]
        print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    print(f"{len(rows)} rows, {sum(row['met'] for row in rows)} met; {options.output}")
    return 0 if all(row["ours"] is not None for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
