"""Tables of `vpnctl`. What comes from the daemon may hold a peer's text: it is shown as text, never as markup."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpnd.config.reader import visible
from vpnd.telemetry.wording import counted

WIDTH_OF_A_FILE: Final = 240  # columns when the output is no terminal: nothing is cut off there

Row = Mapping[str, Any]
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_FILE)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(Text("\n".join(visible(line) for line in str(cell).split("\n"))) for cell in cells))


def _print(table: Table, none: str) -> None:
    if table.row_count:
        _console().print(table)
    else:
        print(none)


def status(report: Row) -> None:
    daemon, children = report["daemon"], report["children"]
    table = Table.grid(padding=(0, 2))
    _add(table, "daemon", f"{daemon.get('daemon')} {daemon.get('version')} on {daemon.get('sysname')} {daemon.get('release')} {daemon.get('machine')}")
    uptime = report["uptime"] or {}
    _add(table, "running", f"{uptime.get('running')}, since {uptime.get('since')}")
    _add(table, "IKE SAs", f"{report['ikesas'].get('total', 0)}, {report['ikesas'].get('half-open', 0)} of them half-open")
    _add(table, "children", f"{children['up']} of {children['total']} up, in {counted(report['connections'], 'connection')}")
    _add(table, "kernel", "\n".join((report["kernel"] or "", *report["kernel-reasons"])))
    _add(table, "policies", report["policies"])
    for name, value in report["counters"].items():
        _add(table, name, value)
    _console().print(table)


def sas(rows: Sequence[Row]) -> None:
    table = _table("SA", "state", "local", "remote", "algorithms", "in", "out", "ends in")
    for sa in rows:
        local = f"{sa.get('local-id')}\n{_endpoint(sa, 'local')}"
        remote = f"{sa.get('remote-id')}\n{_endpoint(sa, 'remote')}"
        _add(table, f"{sa['name']} #{sa.get('uniqueid')}", sa.get("state"), local, remote, _algorithms(sa), "", "", _seconds(sa.get("rekey-time")))
        for child in sa["child-sas"]:
            _add(
                table,
                f"  {child.get('name')} #{child.get('uniqueid')}",
                child.get("state"),
                "\n".join(child.get("local-ts", ())),
                "\n".join(child.get("remote-ts", ())),
                _algorithms(child) + (" in UDP" if child.get("encap") == "yes" else ""),
                _traffic(child, "in"),
                _traffic(child, "out"),
                _seconds(child.get("life-time")),
            )
    _print(table, "no SAs")


def connections(rows: Sequence[Row]) -> None:
    table = _table("connection", "child", "state", "mode", "local", "remote")
    for connection in rows:
        rounds = {side: connection.get(f"{side}-1") or {} for side in ("local", "remote")}
        ends = [f"{', '.join(connection.get(f'{side}_addrs', ()))}\n{rounds[side].get('id', '%any')} ({rounds[side].get('class')})" for side in rounds]
        _add(table, connection["name"], "", "", "", *ends)
        for child in connection["children"]:
            state = "up" if child["up"] else "trapped" if child["trapped"] else "down"
            _add(table, "", child["name"], state, child.get("mode"), "\n".join(child.get("local-ts", ())), "\n".join(child.get("remote-ts", ())))
    _print(table, "no connections")


def policies(rows: Sequence[Row]) -> None:
    table = _table("connection", "child", "mode", "local", "remote")
    for policy in rows:
        ends = ["\n".join(policy.get(f"{side}-ts", ())) for side in ("local", "remote")]
        _add(table, policy.get("ike"), policy.get("child"), policy.get("mode"), *ends)
    _print(table, "no policies")


def _endpoint(sa: Row, side: str) -> str:
    return f"{sa.get(f'{side}-host')}[{sa.get(f'{side}-port')}]"


def _algorithms(sa: Row) -> str:
    names = []
    for key in ("encr", "integ", "prf"):
        if name := sa.get(f"{key}-alg"):
            size = sa.get(f"{key}-keysize")
            names.append(f"{name}-{size}" if size else str(name))
    return "/".join([*names, *([sa["dh-group"]] if sa.get("dh-group") else [])])


def _traffic(child: Row, direction: str) -> str:
    if f"bytes-{direction}" not in child:
        return ""
    used = child.get(f"use-{direction}")
    ago = f"\n{used} s ago" if used is not None else ""
    return f"{_octets(int(child[f'bytes-{direction}']))}, {child[f'packets-{direction}']} packets{ago}"


def _octets(count: float) -> str:
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def _seconds(text: str | None) -> str:
    return "" if text is None else f"{text} s"


def mpls(rows: Sequence[Row]) -> None:
    """Rows of one or two kinds, a table for each; the columns are what their first row has."""
    kinds: dict[tuple[str, ...], Table] = {}
    for row in rows:
        columns = tuple(row)
        table = kinds.setdefault(columns, _table(*columns))
        _add(table, *("\n".join(cell) if isinstance(cell, list) else cell for cell in row.values()))
    for table in kinds.values() or (_table(),):
        _print(table, "none")


def trace(steps: Sequence[Row]) -> None:
    table = Table.grid(padding=(0, 2))
    for step in steps:
        _add(table, step["at"], step["found"])
    _console().print(table)
