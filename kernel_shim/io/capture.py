"""Capture and fail closed: the one place that puts anything of ours into the host, and takes it away again.

What is ours is known by number or name: routes and rules by `PROTOCOL_NUMBER` in our ranges, nftables by table name,
sysctls by what the state file remembers. The state file tells the next start what a dead process left; that start keeps
the `unreachable` twins and the guard until the key manager brought its policies back (`end_takeover`).
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

import structlog

from kernel_shim.io.capture_plan import CapturePlan, Change, sides
from kernel_shim.io.connected import Connected, HostAddress, Sides
from kernel_shim.io.guard import COUNTER as CLEAR_COUNTER
from kernel_shim.io.guard import GuardPlan
from kernel_shim.io.leak_guard import COUNTER as LEAK_COUNTER
from kernel_shim.io.leak_guard import VRF_COUNTER, LeakGuardPlan
from kernel_shim.io.notices import GuardNotices, HostNotices, Notice
from kernel_shim.io.routes import HostRoutes
from kernel_shim.io.settings import PROTOCOL_NUMBER, ShimSettings
from kernel_shim.io.tun import Tun, read_sysctl, write_sysctl
from kernel_shim.model import Action, Direction, IPAddress, IPNetwork, KernelError, Policy
from kernel_shim.nft import Nft

STATE_VERSION: Final = 1
REVERSE_PATH_MARK: Final = "ipv4/conf/all/src_valid_mark"
ANSWER_MARKS: Final = ("ipv4/fwmark_reflect", "ipv6/fwmark_reflect", "ipv4/tcp_fwmark_accept")  # what the kernel answers bears the mark of what it answers
REVERSE_PATH_OF_ALL: Final = "ipv4/conf/all/rp_filter"  # of it and an interface's own the greater counts

log = structlog.get_logger("kernel_shim.capture")


class Capture:
    """Routes, rules, guard and sysctls of one shim. Requests raise KernelError and then leave things as they were."""

    def __init__(self, settings: ShimSettings, tun: Tun) -> None:
        self._settings: Final = settings
        self._versions: Final = (4, 6) if os.path.isdir("/proc/sys/net/ipv6/conf") else (4,)
        self._nft: Final = Nft()
        self._routes: Final = HostRoutes(settings, tun.index)
        self._connected: Final = Connected()
        self._plan: Final = CapturePlan(self._connected)
        self._bound: set[IPAddress] = set()
        self._inside: dict[IPNetwork, frozenset[str]] = {}
        self._vrf_interfaces: frozenset[str] = frozenset()
        self._vrf_marks: Mapping[str, int] = {}
        self._old_tables: list[str] = []
        self._sysctls: dict[str, str] = {}
        self._told: set[str] = set()
        self._host_listeners: list[Callable[[tuple[HostAddress, ...]], None]] = []

        previous = self._read_state()
        ranges = {(settings.table, settings.rule_priority), *((entry["table"], entry["rule_priority"]) for entry in previous)}
        for table, rule_priority in ranges:
            self._routes.find(table, rule_priority)
        for source, slot in list(self._routes.source_tables()):
            self._plan.adopt(source, slot)
        for entry in previous:
            self._sysctls.update(entry["sysctls"])
        stems = {settings.guard_table, *(entry["guard"] for entry in previous)}
        self._guard: Final = GuardPlan(self._name_table(stems), interfaces=(settings.tun, settings.clear_tun), mark=settings.mark)
        self._leaks: Final = LeakGuardPlan(self._guard.table, tun=settings.tun, clear_tun=settings.clear_tun, mark=settings.mark)
        self.takeover = self._routes.found or bool(self._old_tables)
        self._host_notices: Final = HostNotices(self._routes.port, tun.index, PROTOCOL_NUMBER)
        self._guard_notices: Final = GuardNotices(self._guard.table, self._nft.is_ours)
        self._repairs = 0
        try:
            self._write_state()
            self._nft.run(self._guard.create() + self._leaks.create())
            self._routes.install(self._versions)
            self._allow_marked_reverse_path()
            self._refresh_host()
        except BaseException:
            self.give_up()
            raise

    def filenos(self) -> tuple[int, int]:
        """One is readable when somebody changed the host: then `refresh`."""
        return self._host_notices.fileno(), self._guard_notices.fileno()

    def refresh(self) -> None:
        """Follow the host's addresses: preferred sources, subnets on this side. Put again what somebody else took of ours."""
        notice = self._host_notices.read() | self._guard_notices.read()
        try:
            if notice & Notice.ADDRESSES:
                self._refresh_host()
            if notice & (Notice.RULES | Notice.ROUTES):
                self._repaired("routes and rules", self._routes.repair(routes=bool(notice & Notice.ROUTES)))
            if notice & Notice.GUARD:
                bound = "".join(map(self._guard.bind, self._bound))
                vrfs = self._guard.set_vrfs(self._vrf_interfaces, self._vrf_marks)
                self._nft.run(self._guard.restore() + self._leaks.restore() + bound + vrfs + self._inside_commands())
                self._repaired("guard", 1)
        except KernelError as error:
            log.warning("host not followed", reason=error.detail)

    def _repaired(self, what: str, count: int) -> None:
        if count:
            self._repairs += count
            log.warning("put again what another process took away", what=what, count=count)

    def _refresh_host(self) -> None:
        addresses = self._routes.addresses()
        self._connected.set_host(addresses)
        self._routes.apply(self._plan.set_host(addresses))
        for listener in self._host_listeners:
            listener(addresses)
        self._refresh_inside()

    def _refresh_inside(self) -> None:
        inside = self._connected.inside()
        if inside != self._inside:
            before, self._inside = self._inside, inside
            try:
                self._nft.run(self._inside_commands())
            except KernelError:
                self._inside = before
                raise

    def _inside_commands(self) -> str:
        return self._guard.set_inside(self._inside) + self._leaks.set_inside(self._inside)

    @property
    def routes(self) -> HostRoutes:
        return self._routes

    def on_host(self, listener: Callable[[tuple[HostAddress, ...]], None]) -> None:
        """`listener` is called now, and whenever the host's addresses changed."""
        self._host_listeners.append(listener)
        listener(self._routes.addresses())

    def is_local(self, address: IPAddress) -> bool:
        return address in self._bound or self._routes.is_local(address)

    # Policies

    def add(self, policy: Policy) -> None:
        """Capture or guard what the policy is about; counted, so that policies may share prefixes."""
        if policy.selector.version not in self._versions:
            raise KernelError(errno.EAFNOSUPPORT, f"this host has no IPv{policy.selector.version}")
        self._count_sides(policy, add=True)
        try:
            if CapturePlan.captures(policy):
                self._capture(policy)
            elif GuardPlan.guards(policy):
                commands = self._guard.add(policy)
                try:
                    self._nft.run(commands)
                except KernelError:
                    self._guard.remove(policy)
                    raise
            self._follow_connected()
        except KernelError:
            self._count_sides(policy, add=False)
            raise

    def _capture(self, policy: Policy) -> None:
        """Routes before the guard: at no moment is a packet dropped for want of a route."""
        changes = self._plan.add(policy)
        try:
            self._routes.apply(changes)
            commands = self._leaks.add(policy)
            try:
                self._nft.run(commands)
            except KernelError:
                self._leaks.remove(policy)
                raise
        except KernelError:
            with suppress(KernelError):
                self._routes.apply(self._plan.remove(policy))
            raise

    def remove(self, policies: Iterable[Policy]) -> None:
        """Of policies that `add` took. What the kernel refuses to take away is logged and stays: too closed, never too open."""
        changes: list[Change] = []
        commands: list[str] = []
        for policy in policies:
            self._count_sides(policy, add=False)
            if CapturePlan.captures(policy):
                changes += self._plan.remove(policy)
                commands.append(self._leaks.remove(policy))
            elif GuardPlan.guards(policy):
                commands.append(self._guard.remove(policy))
        try:
            self._nft.run("".join(commands))
            self._routes.apply(changes)
            self._follow_connected()
        except KernelError as error:
            log.warning("not all taken away", reason=error.detail)

    def _count_sides(self, policy: Policy, *, add: bool) -> None:
        if policy.action is Action.BYPASS:
            return
        source, destination = sides(policy)
        local, remote = (source, destination) if policy.direction is Direction.OUT else (destination, source)
        outer = frozenset(address for template in policy.templates for address in (template.source, template.destination) if address is not None)
        (self._connected.add if add else self._connected.remove)(Sides(local, remote, outer))

    def _follow_connected(self) -> None:
        self._routes.apply(self._plan.refresh())
        self._refresh_inside()

    # Local addresses of tunnels

    def bound(self, address: IPAddress) -> None:
        """IKE and ESP to this address pass the guard."""
        if address not in self._bound:
            self._nft.run(self._guard.bind(address))
            self._bound.add(address)

    def unbound(self, address: IPAddress) -> None:
        if address in self._bound:
            self._bound.discard(address)
            with suppress(KernelError):
                self._nft.run(self._guard.unbind(address))

    # VRFs

    def set_vrfs(self, vrfs: Mapping[str, int]) -> None:
        """All interfaces that a VRF's table routes, with the mark of its packets: they are kept apart from the host's own traffic, the host answers them
        within the VRF, and reverse paths are not asked of its main table.
        """
        interfaces, marks = frozenset(vrfs), {name: mark for name, mark in vrfs.items() if not in_host_vrf(name)}
        if (interfaces, marks) != (self._vrf_interfaces, self._vrf_marks):
            self._nft.run(self._guard.set_vrfs(interfaces, marks))
            self._vrf_interfaces, self._vrf_marks = interfaces, marks
        for name in interfaces:
            self._allow_any_source(f"ipv4/conf/{name}/rp_filter")
        for name in ANSWER_MARKS if marks else ():
            self._set_sysctl(name, "1")

    def _set_sysctl(self, name: str, wanted: str) -> None:
        value = read_sysctl(name)
        if value not in (None, wanted):
            self._sysctls.setdefault(name, value)
            self._write_state()
            if not write_sysctl(name, wanted) and name not in self._told:
                self._told.add(name)
                log.warning("a setting of the host stays as it is", setting=name, value=value, wanted=wanted)

    def _allow_any_source(self, name: str) -> None:
        """A reverse path check looks a customer's address up in the main table, where it is another's or nobody's. Its addresses are its own affair."""
        self._set_sysctl(name, "0")
        every = read_sysctl(REVERSE_PATH_OF_ALL)
        if every not in (None, "0") and REVERSE_PATH_OF_ALL not in self._told:
            self._told.add(REVERSE_PATH_OF_ALL)
            log.warning("the host checks reverse paths on all interfaces: customers' packets may be dropped", setting=REVERSE_PATH_OF_ALL, value=every)

    # Life

    def end_takeover(self) -> None:
        """The key manager had its say: what it did not bring back goes."""
        if not self.takeover and not self._old_tables:
            return
        self.takeover = False
        try:
            removed = self._routes.remove_stale()
            for table in self._old_tables:
                self._nft.run(f"add table inet {table}\ndelete table inet {table}\n")  # it may be gone
            self._old_tables = []
            self._plan.release_adopted()
            self._write_state()
            log.info("takeover ended", removed=removed)
        except KernelError as error:
            log.warning("stale entries stay", reason=error.detail)

    def statistics(self) -> dict[str, int]:
        """`guard.clear-dropped.packets` and `.bytes` (inbound), `guard.leak-dropped.` likewise (outbound), `guard.vrf-errors-dropped.`, `capture.repairs`."""
        counted = {"capture.repairs": self._repairs}
        counters = (("guard.clear-dropped", CLEAR_COUNTER), ("guard.leak-dropped", LEAK_COUNTER), ("guard.vrf-errors-dropped", VRF_COUNTER))
        for name, counter in counters:
            text = ""
            with suppress(KernelError):
                text = self._nft.run(f"list counter inet {self._guard.table} {counter}\n")
            if found := re.search(r"packets (\d+) bytes (\d+)", text):
                counted |= {f"{name}.packets": int(found[1]), f"{name}.bytes": int(found[2])}
        return counted

    def remove_everything(self) -> None:
        """The orderly end: the host as it was."""
        self._routes.remove_all()
        for table in (*self._old_tables, self._guard.table):
            with suppress(KernelError):
                self._nft.run(f"delete table inet {table}\n")
        for name, value in self._sysctls.items():
            write_sysctl(name, value)
        self._settings.state_file.unlink(missing_ok=True)
        self._close()

    def give_up(self) -> None:
        """A start that failed: what an earlier process left stays closed, else the host is as it was."""
        if self.takeover:
            self._close()
        else:
            self.remove_everything()

    def _close(self) -> None:
        self._host_notices.close()
        self._guard_notices.close()
        self._routes.close()
        self._nft.close()

    def _name_table(self, stems: set[str]) -> str:
        """A new table beside those that earlier processes left: theirs go on dropping until the takeover ends."""
        tables = re.findall(r"^table inet (\w+)_(\d+)$", self._nft.run("list tables inet\n"), re.MULTILINE)
        self._old_tables = [f"{stem}_{number}" for stem, number in tables if stem in stems]
        own = self._settings.guard_table
        return f"{own}_{max((int(number) for stem, number in tables if stem == own), default=0) + 1}"

    def _allow_marked_reverse_path(self) -> None:
        """Strict reverse path checks ask the routes for the peer's address; our mark, set by the guard, keeps them off the capture."""
        names = os.listdir("/proc/sys/net/ipv4/conf")
        if any(read_sysctl(f"ipv4/conf/{name}/rp_filter") == "1" for name in names):
            self._set_sysctl(REVERSE_PATH_MARK, "1")

    def _read_state(self) -> list[dict[str, Any]]:
        try:
            entry = json.loads(self._settings.state_file.read_text())
            if entry["version"] != STATE_VERSION or not isinstance(entry["sysctls"], dict):
                raise ValueError("of another version")
            int(entry["table"]), int(entry["rule_priority"]), str(entry["guard"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("state file not usable", path=str(self._settings.state_file), reason=str(error))
            return []
        return [entry]

    def _write_state(self) -> None:
        entry = {
            "version": STATE_VERSION,
            "tun": self._settings.tun,
            "table": self._settings.table,
            "rule_priority": self._settings.rule_priority,
            "guard": self._settings.guard_table,
            "sysctls": self._sysctls,
        }
        path = self._settings.state_file
        fresh = path.with_name(path.name + ".new")
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fresh.write_text(json.dumps(entry) + "\n")
            fresh.replace(path)
        except OSError as error:
            raise KernelError.of(error, f"state file {path}") from error


def in_host_vrf(interface: str) -> bool:
    """Whether the interface belongs to a VRF link of the host's own kernel, which then keeps its packets apart."""
    with suppress(OSError), open(f"/sys/class/net/{os.path.basename(interface)}/master/uevent") as file:
        return "DEVTYPE=vrf" in file.read().split()
    return False
