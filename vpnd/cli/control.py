"""`vpnctl`: ask a running daemon, over its control socket."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import shtab

from vpnd.cli import tables
from vpnd.config.model import DaemonConfig
from vpnd.config.reader import visible
from vpnd.config.tree import Section
from vpnd.control.client import CommandFailed, ControlUnavailable, ViciClient
from vpnd.control.vici.formats import metadata_version

DEFAULT_SOCKET: Final = DaemonConfig().control_socket
ANSWER_TIMEOUT: Final = 30.0  # s for an answer that needs no exchange with a peer
LONGEST_TIMEOUT: Final = 365 * 86400.0  # s
GRACE: Final = 5.0  # s beyond a time-out that the daemon itself keeps

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1  # the daemon said no, or time is over
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 3  # no daemon, no permission, or it went away

Report = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line; completion and tests read it."""
    top = argparse.ArgumentParser(
        prog="vpnctl",
        description="Ask a running vpnd. Exit status 0: done; 1: the daemon says no, or time is over; 2: asked wrongly; 3: no daemon.",
    )
    top.add_argument("--version", action="version", version=f"vpnctl {metadata_version()}")
    shtab.add_argument_to(top, "--print-completion", help="print a completion script for a shell")
    _common(top, defaults=True)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, help_text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help_text, description=help_text)
        _common(added, defaults=False)
        return added

    command("status", "the daemon in a few lines")
    sas = command("sas", "IKE SAs and their CHILD_SAs")
    sas.add_argument("--ike", metavar="CONNECTION", help="only those of a connection")
    conns = command("conns", "configured connections, and which of their children are up")
    conns.add_argument("--ike", metavar="CONNECTION", help="only this one")
    command("reload", "read the configuration file again, and say what changed")
    command("policies", "installed traps and shunts")
    for name, help_text in (
        ("up", "bring a child up, and wait for it"),
        ("down", "delete the SAs of a child"),
        ("wait", "wait until a child is up; starts nothing"),
    ):
        added = command(name, help_text)
        added.add_argument("child", metavar="CHILD")
        if name != "wait":
            added.add_argument("--ike", metavar="CONNECTION", help="the child's connection, where several have one of that name")
    redirect = command("redirect", "send clients to another gateway (RFC 5685)")
    redirect.add_argument("gateway", metavar="GATEWAY", help="its address or domain name")
    redirect.add_argument("--ike", metavar="CONNECTION", help="only clients of a connection")
    redirect.add_argument("--peer-ip", metavar="ADDRESS", help="only clients at this address, or in this network or range")
    redirect.add_argument("--peer-id", metavar="IDENTITY", help="only clients of this identity, which may have wildcards")
    _mpls_commands(command)
    return top


def _mpls_commands(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    below = command("mpls", "labels: what stands in the kernel, and what would become of a packet").add_subparsers(dest="table", required=True)

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        added = below.add_parser(name, help=help_text, description=help_text)
        _common(added, defaults=False)
        return added

    add("lfib", "labels and routes, and where they lead").add_argument("vrf", metavar="VRF", nargs="?", help="only those of one VRF")
    add("vrfs", "VRFs with their interfaces and route targets")
    add("labels", "what each label is for and which peer may send it")
    trace = add("trace", "label by label what would become of a packet")
    trace.add_argument("vrf", metavar="VRF", nargs="?", help="whose packet it is")
    trace.add_argument("address", metavar="ADDRESS", nargs="?", help="where it goes")
    trace.add_argument("--peer", metavar="PEER", help="or who sent it, with --label")
    trace.add_argument("--label", metavar="LABELS", help="its labels, outermost first, with commas between; --to says where its IP packet goes")
    trace.add_argument("--to", metavar="ADDRESS", help="the destination beneath the labels")


def _common(added: argparse.ArgumentParser, *, defaults: bool) -> None:
    """Options that may stand before and after the command."""

    def default(value: object) -> object:
        return value if defaults else argparse.SUPPRESS

    path = added.add_argument("--socket", type=Path, default=default(DEFAULT_SOCKET), metavar="PATH", help=f"control socket ({DEFAULT_SOCKET})")
    path.complete = shtab.FILE  # type: ignore[attr-defined]
    added.add_argument("--json", action="store_true", default=default(False), help="one JSON value instead of a table")
    added.add_argument("--timeout", type=_seconds, default=default(None), metavar="SECONDS", help="how long to wait for the answer")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and at most a year")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: see `parser`."""
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = {
        "status": _status,
        "sas": _sas,
        "conns": _conns,
        "policies": _policies,
        "reload": _reload,
        "up": _up,
        "down": _down,
        "wait": _wait,
        "redirect": _redirect,
        "mpls": _mpls,
    }[options.command]
    try:
        return run(options)
    except ControlUnavailable as error:
        return _failed(options, str(error), EXIT_UNAVAILABLE)
    except CommandFailed as error:
        return _failed(options, str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # else Python complains once more at its end
        return EXIT_FAILED


def _failed(options: argparse.Namespace, message: str, status: int) -> int:
    if options.json:
        print(json.dumps({"success": False, "error": message}))
    else:
        print(f"vpnctl: {visible(message)}", file=sys.stderr)
    return status


def _print(options: argparse.Namespace, value: object, show: Callable[[], None]) -> int:
    if options.json:
        print(json.dumps(value, indent=2))
    else:
        show()
    return EXIT_OK


def _connect(options: argparse.Namespace) -> ViciClient:
    return ViciClient(options.socket, options.timeout or ANSWER_TIMEOUT)


# Questions


def _status(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        version, stats, more = client.request("version"), client.request("stats"), client.request("x-stats")
        connections = _connections(client, None)
    children = [child for connection in connections for child in connection["children"]]
    report: Report = {
        "daemon": version.plain(),
        "uptime": stats.plain().get("uptime"),
        "ikesas": _numbers(stats.section("ikesas")),
        "connections": len(connections),
        "children": {"total": len(children), "up": sum(child["up"] for child in children)},
        "kernel": more.text("kernel"),
        "kernel-reasons": more.plain().get("kernel-reasons") or [],
        "policies": int(more.text("policies") or 0),
        "counters": _numbers(more.section("counters")),
    }
    return _print(options, report, lambda: tables.status(report))


def _numbers(section: Section | None) -> Mapping[str, int]:
    return {name: int(section.text(name) or 0) for name in section.entries} if section else {}


def _sas(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        sas = _list_sas(client, options.ike)
    return _print(options, sas, lambda: tables.sas(sas))


def _list_sas(client: ViciClient, ike: str | None) -> list[Report]:
    """IKE SAs; `name` and `child-sas`, a list, beside strongSwan's keys."""
    sas: dict[str, Report] = {}
    for event in client.streamed("list-sas", "list-sa", {"ike": ike} if ike else None):
        for name, section in event.sections():
            values = section.plain()
            children = section.section("child-sas")
            values["child-sas"] = [child.plain() for _, child in children.sections()] if children else []
            # An IKE SA with many children comes in several parts.
            known = sas.setdefault(str(values.get("uniqueid")), {"name": name, **values, "child-sas": []})
            known["child-sas"] += values["child-sas"]
    return list(sas.values())


def _conns(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        connections = _connections(client, options.ike)
    return _print(options, connections, lambda: tables.connections(connections))


def _connections(client: ViciClient, ike: str | None) -> list[Report]:
    """Configured connections, with `name`, and `children`, a list, each with `name`, `up` and `trapped`."""
    message = {"ike": ike} if ike else {}
    up = {(sa["name"], child["name"]) for sa in _list_sas(client, ike) for child in sa["child-sas"] if child.get("state") == "INSTALLED"}
    everything = {**message, "trap": "yes", "pass": "yes", "drop": "yes"}
    policies = client.streamed("list-policies", "list-policy", everything)
    trapped = {(section.text("ike"), section.text("child")) for event in policies for _, section in event.sections()}
    connections: dict[str, Report] = {}
    for event in client.streamed("list-conns", "list-conn", message):
        for name, section in event.sections():
            children = section.section("children") or Section()
            values = {key: value for key, value in section.plain().items() if key != "children"}
            known = connections.setdefault(name, {"name": name, **values, "children": []})
            known["children"] += [
                {"name": child, **below.plain(), "up": (name, child) in up, "trapped": (name, child) in trapped} for child, below in children.sections()
            ]
    return list(connections.values())


def _policies(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        events = client.streamed("list-policies", "list-policy", {"trap": "yes", "pass": "yes", "drop": "yes"})
    policies = [section.plain() for event in events for _, section in event.sections()]
    return _print(options, policies, lambda: tables.policies(policies))


def _mpls(options: argparse.Namespace) -> int:
    if options.table == "trace":
        return _mpls_trace(options)
    message = {"table": options.table, **({"vrf": options.vrf} if options.table == "lfib" and options.vrf else {})}
    with _connect(options) as client:
        rows = [event.plain() for event in client.streamed("x-mpls", "x-mpls-row", message)]
    return _print(options, rows, lambda: tables.mpls(rows))


def _mpls_trace(options: argparse.Namespace) -> int:
    if options.peer is not None and options.label is not None:
        message = {"peer": options.peer, "labels": options.label, **({"address": options.to} if options.to else {})}
    elif options.vrf is not None and options.address is not None and options.peer is None and options.label is None:
        message = {"vrf": options.vrf, "address": options.address}
    else:
        return _failed(options, "a VRF and an address are needed, or --peer and --label", EXIT_USAGE)
    with _connect(options) as client:
        steps = client.request("x-mpls-trace", message).section("steps") or Section()
    found = [step.plain() for _, step in steps.sections()]
    return _print(options, found, lambda: tables.trace(found))


# Orders


def _reload(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        changes = client.request("x-reload").plain().get("changes")
    lines = list(changes) if isinstance(changes, list) else []
    return _print(options, {"success": True, "changes": lines}, lambda: print("\n".join(map(visible, map(str, lines)))))


def _up(options: argparse.Namespace) -> int:
    return _order(options, "initiate")


def _down(options: argparse.Namespace) -> int:
    return _order(options, "terminate")


def _redirect(options: argparse.Namespace) -> int:
    selectors = {"ike": options.ike, "peer-ip": options.peer_ip, "peer-id": options.peer_id}
    chosen = {name: value for name, value in selectors.items() if value is not None}
    # without a selector: everybody
    message = {"gateway": options.gateway, **(chosen or {"peer-id": "%any"})}
    with ViciClient(options.socket, options.timeout or ANSWER_TIMEOUT) as client:
        matches = client.request("redirect", message).text("matches") or "0"
    return _print(options, {"success": True, "matches": int(matches)}, lambda: print(f"{visible(matches)} redirected to {visible(options.gateway)}"))


def _order(options: argparse.Namespace, command: str) -> int:
    message = {"child": options.child, **({"ike": options.ike} if options.ike else {})}
    if options.timeout:
        message["timeout"] = str(int(options.timeout * 1000) or 1)

    def progress(line: Section) -> None:
        if not options.json:
            print(f"[{visible(line.text('group') or '')}] {visible(line.text('msg') or '')}", file=sys.stderr)

    with ViciClient(options.socket, options.timeout + GRACE if options.timeout else None) as client:
        client.streamed(command, "control-log", message, progress)
    return _print(options, {"success": True, "child": options.child}, lambda: print(f"{visible(options.child)}: {options.command}"))


def _wait(options: argparse.Namespace) -> int:
    message = {"child": options.child}
    if options.timeout:
        message["timeout"] = str(int(options.timeout * 1000) or 1)
    with ViciClient(options.socket, options.timeout + GRACE if options.timeout else None) as client:
        client.request("x-wait", message)
    return _print(options, {"success": True, "child": options.child}, lambda: print(f"{visible(options.child)}: up"))


if __name__ == "__main__":
    sys.exit(main())
