"""Our routing rules and routes in the host."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, Final, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.io.capture_plan import EVERYTHING, HOST_TABLE, Change, Kind, Route, Rule
from kernel_shim.io.connected import HostAddress
from kernel_shim.io.rtnetlink import RT_SCOPE_LINK, RouteChange, RouteSocket, RouteType
from kernel_shim.io.settings import PRIORITIES, PROTOCOL_NUMBER, TABLES, ShimSettings
from kernel_shim.model import IPAddress, IPNetwork, KernelError

MEMBER_METRIC: Final = 50
CAPTURE_METRIC: Final = 100
TWIN_METRIC: Final = 10_000
THROW_METRIC: Final = 200
CLOSED_METRIC: Final = 20_000

# Priorities within our range, in the order in which the kernel asks them.
MARKED: Final = 0  # our own packets: skip to the end
LEAVING: Final = 1  # bypassed packets leaving again: skip to the end
VRFS: Final = 5  # what comes from a customer: its own table, which lets nothing fall through
SOURCES: Final = 10
HOST: Final = 20
END: Final = PRIORITIES - 1

RTM_F_CLONED: Final = 0x200
IFA_F_TENTATIVE: Final = 0x40
IFA_F_DEPRECATED: Final = 0x20

_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_VERSION: Final = {socket.AF_INET: 4, socket.AF_INET6: 6}
_KINDS: Final = {TWIN_METRIC: RouteType.UNREACHABLE, THROW_METRIC: RouteType.THROW, CLOSED_METRIC: RouteType.BLACKHOLE}
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
        self._socket: Final = RouteSocket(PROTOCOL_NUMBER)
        self._rules: set[RuleKey] = set()
        self._routes: dict[RouteKey, RouteChange] = {}  # in the order in which they were put: a twin before its capture
        self._stale_rules: set[RuleKey] = set()
        self._stale_routes: set[RouteKey] = set()
        self._versions: tuple[int, ...] = ()

    def find(self, table: int, rule_priority: int) -> None:
        """Look for what is there already in these ranges; it becomes stale unless it is put again."""
        for rule in _rules(self._route):
            if rule_priority <= rule.priority < rule_priority + PRIORITIES:
                self._stale_rules.add(rule)
        tables = {*range(table, table + TABLES), *(rule.table for rule in self._stale_rules if rule.priority == rule_priority + VRFS)}
        for route in _routes(self._route):
            if route.table in tables:
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
        self._versions = tuple(versions)
        for version in self._versions:
            self._put_rule(RuleKey(version, base + END))
            self._put_rule(RuleKey(version, base + MARKED, mark=self._settings.mark, goto=base + END))
            self._put_rule(RuleKey(version, base + LEAVING, interface=self._settings.clear_tun, goto=base + END))

    def apply(self, changes: Iterable[Change]) -> None:
        """KernelError for the first that the kernel refuses; routes that were asked for together with it may stand."""
        routes: list[RouteChange] = []
        for put, item in changes:
            if isinstance(item, Route):
                routes += self._route_changes(put, item)
                continue
            self._change_routes(routes)
            routes = []
            (self._put_rule if put else self._remove_rule)(self._rule_key(item))
        self._change_routes(routes)

    # Tables of VRFs

    def close_table(self, table: int) -> None:
        """What has no other route in this table ends there."""
        self._change_routes([RouteChange(True, RouteType.BLACKHOLE, table, EVERYTHING[version], CLOSED_METRIC) for version in self._versions])

    def bind_interface(self, interface: str, table: int) -> None:
        """What comes from `interface` is routed by `table`."""
        for key in self._interface_rules(interface, table):
            self._put_rule(key)

    def release_interface(self, interface: str, table: int) -> None:
        for key in self._interface_rules(interface, table):
            with suppress(KernelError):
                self._remove_rule(key)

    def _interface_rules(self, interface: str, table: int) -> list[RuleKey]:
        return [RuleKey(version, self._settings.rule_priority + VRFS, table, interface=interface) for version in self._versions]

    def bind_mark(self, number: int, table: int) -> int:
        """What the host answers to packets of the VRF with that number is routed by `table`; the mark that says so. What had it before has it no more."""
        mark = self._settings.mark + 1 + number & 0xFFFFFFFF
        for key in self._mark_rules(mark, table):
            for other in [it for it in self._stale_rules | self._rules if (it.version, it.mark) == (key.version, mark) and it != key]:
                self._remove_rule(other)
            self._put_rule(key)
        return mark

    def release_mark(self, mark: int, table: int) -> None:
        for key in self._mark_rules(mark, table):
            with suppress(KernelError):
                self._remove_rule(key)

    def _mark_rules(self, mark: int, table: int) -> list[RuleKey]:
        return [RuleKey(version, self._settings.rule_priority + VRFS, table, mark=mark) for version in self._versions]

    def route_in(self, table: int, destination: IPNetwork, interface: int, *, own: bool = False, preferred: IPAddress | None = None) -> None:
        """A route of a VRF; `own` ones, to the customer's own subnets, come before those through tunnels. `preferred`: from where the host itself sends."""
        if destination.version in self._versions:
            metric = MEMBER_METRIC if own else CAPTURE_METRIC
            self._change_routes([RouteChange(True, RouteType.UNICAST, table, destination, metric, interface, preferred)])

    def unroute_in(self, table: int, destination: IPNetwork, *, own: bool = False) -> None:
        with suppress(KernelError):
            self._delete([RouteKey(destination.version, table, destination, MEMBER_METRIC if own else CAPTURE_METRIC)])

    def empty_table(self, table: int) -> None:
        with suppress(KernelError):
            self._delete([key for key in self._routes if key.table == table])

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
        try:
            self._route.rule(verb, **arguments)
        except NetlinkError as error:
            # What is there already was taken over; what is gone is gone.
            if (verb, error.code) not in (("add", errno.EEXIST), ("del", errno.ENOENT), ("del", errno.ESRCH)):
                raise KernelError(error.code, f"rule {verb} {key.source or 'all'} priority {key.priority}: {error.args[-1]}") from error

    def _route_changes(self, put: bool, route: Route) -> list[RouteChange]:
        table = self._settings.table + route.table
        if route.kind is Kind.THROW:
            return [RouteChange(put, RouteType.THROW, table, route.destination, THROW_METRIC)]
        twin = RouteChange(put, RouteType.UNREACHABLE, table, route.destination, TWIN_METRIC)
        capture = RouteChange(put, RouteType.UNICAST, table, route.destination, CAPTURE_METRIC, self._tun if put else 0, route.preferred)
        # At no moment does the capture route stand alone.
        return [twin, capture] if put else [capture, twin]

    def _change_routes(self, changes: list[RouteChange]) -> None:
        refused: KernelError | None = None
        for change, error in zip(changes, self._socket.change(changes), strict=True):
            key = RouteKey(change.destination.version, change.table, change.destination, change.metric)
            if change.put and error == 0:
                self._routes[key] = change
            # What is gone already went with its interface or its address.
            elif not change.put and error in (0, errno.ESRCH, errno.ENOENT, errno.ENODEV):
                self._routes.pop(key, None)
                self._stale_routes.discard(key)
            elif refused is None:
                refused = KernelError(error, f"route {change.destination} table {change.table}: {os.strerror(error)}")
        if refused is not None:
            raise refused

    def _delete(self, keys: Iterable[RouteKey]) -> None:
        self._change_routes([RouteChange(False, _KINDS.get(key.metric, RouteType.UNICAST), key.table, key.destination, key.metric) for key in keys])

    @property
    def port(self) -> int:
        """The netlink port of our route changes."""
        return self._socket.port

    def repair(self, *, routes: bool) -> int:
        """Put again what somebody else took away of our rules, and of our routes too if asked; how many. KernelError as `apply`."""
        rules = self._rules.difference(_rules(self._route))
        for rule in sorted(rules, reverse=True):  # what rules jump to comes before them
            self._change_rule("add", rule)
        if not routes:
            return len(rules)
        present = set(_routes(self._route))
        missing = [change for key, change in self._routes.items() if key not in present]
        self._change_routes(missing)
        return len(rules) + len(missing)

    def remove_stale(self) -> int:
        """Take away what an earlier process left and nobody put again; how many."""
        rules, routes = self._stale_rules - self._rules, self._stale_routes - self._routes.keys()
        for rule in rules:
            self._remove_rule(rule)
        self._delete(routes)
        self._stale_rules, self._stale_routes = set(), set()
        return len(rules) + len(routes)

    def remove_all(self) -> None:
        """Rules before routes, so that no packet meets a half of them."""
        for rule in sorted(self._rules | self._stale_rules):
            with suppress(KernelError):
                self._remove_rule(rule)
        with suppress(KernelError):
            self._delete(self._routes.keys() | self._stale_routes)

    def addresses(self) -> tuple[HostAddress, ...]:
        """Addresses of global scope that are usable as a source, those of our own interfaces excepted."""
        names = {link["index"]: link.get("ifname") for link in self._route.get_links()}
        ours = (self._settings.tun, self._settings.clear_tun)
        found = []
        for entry in self._route.get_addr():
            text = entry.get("local") or entry.get("address")
            name = names.get(entry["index"])
            flags = entry.get("flags") or 0
            if text is None or name is None or name in ours or entry["scope"] >= RT_SCOPE_LINK or flags & (IFA_F_TENTATIVE | IFA_F_DEPRECATED):
                continue
            interface = ip_interface(f"{text}/{entry['prefixlen']}")
            found.append(HostAddress(name, ip_address(text), interface.network))
        return tuple(sorted(found, key=str))

    def is_local(self, address: IPAddress) -> bool:
        return any(found.address == address for found in self.addresses())

    def close(self) -> None:
        self._route.close()
        self._socket.close()


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
