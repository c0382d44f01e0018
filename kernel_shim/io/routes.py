"""Our routing rules and routes in the host, over netlink (pyroute2)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, Final, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.io.capture_plan import EVERYTHING, HOST_TABLE, Change, Kind, Route, Rule
from kernel_shim.io.connected import HostAddress
from kernel_shim.io.settings import PRIORITIES, PROTOCOL_NUMBER, TABLES, ShimSettings
from kernel_shim.model import IPAddress, IPNetwork, KernelError

CAPTURE_METRIC: Final = 100
TWIN_METRIC: Final = 10_000
THROW_METRIC: Final = 200

# Priorities within our range, in the order in which the kernel asks them.
MARKED: Final = 0  # our own packets: skip to the end
LEAVING: Final = 1  # bypassed packets leaving again: skip to the end
SOURCES: Final = 10
HOST: Final = 20
END: Final = PRIORITIES - 1

SCOPE_UNIVERSE: Final = 0
SCOPE_LINK: Final = 253
RT_SCOPE_HOST: Final = 254
RTM_F_CLONED: Final = 0x200
IFA_F_TENTATIVE: Final = 0x40
IFA_F_DEPRECATED: Final = 0x20

_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_VERSION: Final = {socket.AF_INET: 4, socket.AF_INET6: 6}
_UNSPECIFIED: Final = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - a rule's "no source yet", not a bind


class RuleKey(NamedTuple):
    """What tells two rules apart. `source` is a prefix as text, or empty."""

    version: int
    priority: int
    table: int = 0
    source: str = ""
    interface: str = ""
    mark: int = 0
    goto: int = 0


class RouteKey(NamedTuple):
    """What tells two routes apart."""

    version: int
    table: int
    destination: IPNetwork
    metric: int


class HostRoutes:
    """Carries out a `CapturePlan`. What an earlier process left stays until `remove_stale`."""

    def __init__(self, settings: ShimSettings, tun: int) -> None:
        self._settings: Final = settings
        self._tun: Final = tun
        self._route: Final = IPRoute()
        self._rules: set[RuleKey] = set()
        self._routes: set[RouteKey] = set()
        self._stale_rules: set[RuleKey] = set()
        self._stale_routes: set[RouteKey] = set()

    def find(self, table: int, rule_priority: int) -> None:
        """Look for what is there already in these ranges; it becomes stale unless it is put again."""
        for rule in _rules(self._route):
            if rule_priority <= rule.priority < rule_priority + PRIORITIES:
                self._stale_rules.add(rule)
        for route in _routes(self._route):
            if table <= route.table < table + TABLES:
                self._stale_routes.add(route)

    @property
    def found(self) -> bool:
        """An earlier process left something."""
        return bool(self._stale_rules or self._stale_routes)

    def source_tables(self) -> Iterator[tuple[IPNetwork, int]]:
        """The sources that have a table already, and its offset."""
        for rule in self._stale_rules:
            offset = rule.table - self._settings.table
            if rule.priority == self._settings.rule_priority + SOURCES and 0 <= offset < HOST_TABLE:
                yield ip_network(rule.source) if rule.source else EVERYTHING[rule.version], offset

    def install(self, versions: Iterable[int]) -> None:
        """The rules that every capture needs: own and bypassed packets skip it."""
        base = self._settings.rule_priority
        for version in versions:
            self._put_rule(RuleKey(version, base + END))
            self._put_rule(RuleKey(version, base + MARKED, mark=self._settings.mark, goto=base + END))
            self._put_rule(RuleKey(version, base + LEAVING, interface=self._settings.clear_tun, goto=base + END))

    def apply(self, changes: Iterable[Change]) -> None:
        """KernelError at the first that the kernel refuses."""
        for put, item in changes:
            if isinstance(item, Rule):
                (self._put_rule if put else self._remove_rule)(self._rule_key(item))
            else:
                (self._put_route if put else self._remove_route)(item)

    def _rule_key(self, rule: Rule) -> RuleKey:
        base, table = self._settings.rule_priority, self._settings.table + rule.table
        if rule.source is not None:
            return RuleKey(rule.version, base + SOURCES, table, str(rule.source) if rule.source.prefixlen else "")
        if rule.version == 4:
            return RuleKey(4, base + HOST, table, "0.0.0.0/32")
        return RuleKey(6, base + HOST, table, interface="lo")

    def _put_rule(self, key: RuleKey) -> None:
        self._change_rule("add", key)
        self._rules.add(key)

    def _remove_rule(self, key: RuleKey) -> None:
        self._change_rule("del", key)
        self._rules.discard(key)
        self._stale_rules.discard(key)

    def _change_rule(self, verb: str, key: RuleKey) -> None:
        arguments: dict[str, Any] = {"family": _FAMILY[key.version], "priority": key.priority, "protocol": PROTOCOL_NUMBER}
        if key.table:
            arguments["table"] = key.table
        elif key.goto:
            arguments |= {"action": "goto", "goto": key.goto}
        else:
            arguments["action"] = "nop"
        if key.source:
            source = ip_network(key.source)
            arguments |= {"src": str(source.network_address), "src_len": source.prefixlen}
        if key.interface:
            arguments["iifname"] = key.interface
        if key.mark:
            arguments |= {"fwmark": key.mark, "fwmask": 0xFFFFFFFF}
        self._call("rule", verb, arguments)

    def _put_route(self, route: Route) -> None:
        version, table = route.destination.version, self._settings.table + route.table
        common: dict[str, Any] = {"family": _FAMILY[version], "dst": str(route.destination), "table": table, "proto": PROTOCOL_NUMBER}
        if route.kind is Kind.THROW:
            self._call("route", "replace", common | {"type": "throw", "priority": THROW_METRIC})
            self._routes.add(RouteKey(version, table, route.destination, THROW_METRIC))
            return
        # The twin first: at no moment does the capture route stand alone.
        self._call("route", "replace", common | {"type": "unreachable", "priority": TWIN_METRIC})
        self._routes.add(RouteKey(version, table, route.destination, TWIN_METRIC))
        capture = common | {"oif": self._tun, "priority": CAPTURE_METRIC, "scope": SCOPE_LINK if version == 4 else SCOPE_UNIVERSE}
        if route.preferred is not None:
            capture["prefsrc"] = str(route.preferred)
        self._call("route", "replace", capture)
        self._routes.add(RouteKey(version, table, route.destination, CAPTURE_METRIC))

    def _remove_route(self, route: Route) -> None:
        version, table = route.destination.version, self._settings.table + route.table
        for metric in (THROW_METRIC,) if route.kind is Kind.THROW else (CAPTURE_METRIC, TWIN_METRIC):
            self._delete(RouteKey(version, table, route.destination, metric))

    def _delete(self, key: RouteKey) -> None:
        arguments = {"family": _FAMILY[key.version], "dst": str(key.destination), "table": key.table, "priority": key.metric, "proto": PROTOCOL_NUMBER}
        if key.metric == TWIN_METRIC:
            arguments["type"] = "unreachable"
        elif key.metric == THROW_METRIC:
            arguments["type"] = "throw"
        elif key.version == 4:
            arguments["scope"] = SCOPE_LINK
        self._call("route", "del", arguments)
        self._routes.discard(key)
        self._stale_routes.discard(key)

    def _call(self, what: str, verb: str, arguments: dict[str, Any]) -> None:
        try:
            getattr(self._route, what)(verb, **arguments)
        except NetlinkError as error:
            # What is there already was taken over; what is gone went with its interface or its address.
            if (verb == "add" and error.code == errno.EEXIST) or (verb == "del" and error.code in (errno.ESRCH, errno.ENOENT, errno.ENODEV)):
                return
            subject = arguments.get("dst") or arguments.get("src") or "all"
            raise KernelError(error.code, f"{what} {verb} {subject} table {arguments.get('table', 0)}: {error.args[-1]}") from error

    def remove_stale(self) -> int:
        """Take away what an earlier process left and nobody put again; how many."""
        rules, routes = self._stale_rules - self._rules, self._stale_routes - self._routes
        for rule in rules:
            self._remove_rule(rule)
        for route in routes:
            self._delete(route)
        self._stale_rules, self._stale_routes = set(), set()
        return len(rules) + len(routes)

    def remove_all(self) -> None:
        """Rules before routes, so that no packet meets a half of them."""
        for rule in sorted(self._rules | self._stale_rules):
            with suppress(KernelError):
                self._remove_rule(rule)
        for route in list(self._routes | self._stale_routes):
            with suppress(KernelError):
                self._delete(route)

    def addresses(self) -> tuple[HostAddress, ...]:
        """Addresses of global scope that are usable as a source, those of our own interfaces excepted."""
        names = {link["index"]: link.get("ifname") for link in self._route.get_links()}
        ours = (self._settings.tun, self._settings.clear_tun)
        found = []
        for entry in self._route.get_addr():
            text = entry.get("local") or entry.get("address")
            name = names.get(entry["index"])
            flags = entry.get("flags") or 0
            if text is None or name is None or name in ours or entry["scope"] >= SCOPE_LINK or flags & (IFA_F_TENTATIVE | IFA_F_DEPRECATED):
                continue
            interface = ip_interface(f"{text}/{entry['prefixlen']}")
            found.append(HostAddress(name, ip_address(text), interface.network))
        return tuple(sorted(found, key=str))

    def is_local(self, address: IPAddress) -> bool:
        return any(found.address == address for found in self.addresses())

    def close(self) -> None:
        self._route.close()


def _rules(route: IPRoute) -> Iterator[RuleKey]:
    for family, version in _VERSION.items():
        for rule in route.get_rules(family=family):
            if rule.get("protocol") != PROTOCOL_NUMBER:
                continue
            length = rule["src_len"]
            source = f"{rule.get('src') or _UNSPECIFIED[version]}/{length}" if length else ""
            yield RuleKey(
                version,
                rule.get("priority") or 0,
                rule.get("table") or 0,
                source,
                rule.get("iifname") or "",
                rule.get("fwmark") or 0,
                rule.get("goto") or 0,
            )


def _routes(route: IPRoute) -> Iterator[RouteKey]:
    for family, version in _VERSION.items():
        for entry in route.get_routes(family=family, proto=PROTOCOL_NUMBER):
            if entry["flags"] & RTM_F_CLONED:
                continue
            destination = ip_network(f"{entry.get('dst') or _UNSPECIFIED[version]}/{entry['dst_len']}")
            yield RouteKey(version, entry.get("table") or 0, destination, entry.get("priority") or 0)
