"""ACQUIREs that nobody heard: another listener took them, and the key manager's socket was full."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from lab.namespaces import Namespace, stopping
from lab.process import Process, wait_until
from lab.traffic import UdpStream, udp_sink
from lab.tunnel import Side, Tunnel
from realkernel.kernel_ends import NEAR, TRAP, Ends, two_ends, until, within
from realkernel.kernel_gateways import XfrmGateway, kernel_pair, xfrm

from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import Acquire, AddressRange, KernelEvent, ReqId
from kernel_shim.xfrm.constants import NETLINK_XFRM, Group

pytestmark = pytest.mark.realkernel

POLICIES = 100
FLOOD = 200  # ACQUIREs: more than an event socket of the smallest size holds
PIDFD_GETFD = 438  # pidfd_getfd(2)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with two_ends() as both:
        yield both


def flood(namespace: Namespace, network: IPv4Network, count: int) -> None:
    """One packet to each of `count` addresses."""
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(count):
            try:
                sender.sendto(b"x", (str(network[number + 1]), 9))
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ESRCH):
                    raise


def narrow_event_socket(pid: int) -> None:
    """The socket by which a process hears of ACQUIREs gets the smallest buffer there is; the kernel's own bound would take thousands to reach."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    narrowed = 0
    for entry in Path("/proc", str(pid), "fd").iterdir():
        try:
            kind = os.readlink(entry)
        except FileNotFoundError:
            continue  # closed meanwhile: not that one
        if not kind.startswith("socket:"):
            continue
        descriptor = libc.syscall(PIDFD_GETFD, pidfd, int(entry.name), 0)
        if descriptor < 0 and ctypes.get_errno() == errno.EBADF:
            continue  # likewise
        with socket.socket(fileno=descriptor) as theirs:
            if (theirs.family, theirs.proto) == (socket.AF_NETLINK, NETLINK_XFRM) and theirs.getsockname()[1]:
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                narrowed += 1
    os.close(pidfd)
    assert narrowed == 1


def xfrm_sockets(namespace: Namespace) -> list[list[str]]:
    """Of each NETLINK_XFRM socket here: sk, family, port, groups, rmem, wmem, dump, locks, drops."""
    lines = namespace.call(Path("/proc/thread-self/net/netlink").read_text).splitlines()[1:]
    return [fields for fields in map(str.split, lines) if int(fields[1]) == NETLINK_XFRM]


def lost(namespace: Namespace) -> int:
    """Messages that those sockets had no room for."""
    return sum(int(fields[8]) for fields in xfrm_sockets(namespace))


@contextmanager
def monitored(namespace: Namespace) -> Iterator[Process]:
    """Somebody else hears of ACQUIREs from now on; what nobody hears of, the kernel asks again."""

    def listening() -> int:
        return sum(int(fields[3], 16) >> Group.ACQUIRE - 1 & 1 for fields in xfrm_sockets(namespace))

    before = listening()
    with stopping(namespace.start(["ip", "xfrm", "monitor", "acquire"], "monitor")) as monitor:
        wait_until(lambda: listening() > before, "the monitor listens")
        yield monitor


def test_with_a_monitor_attached_and_a_full_socket_each_acquire_is_found(ends: Ends) -> None:
    """To the kernel each was delivered, so its larval SA stands in the way of the next."""
    with monitored(ends.here) as monitor:

        async def body(channel: XfrmChannel, events: list[KernelEvent]) -> None:
            for number in range(POLICIES):
                selector = replace(TRAP.selector, destination=AddressRange.of(IPv4Network(f"10.2.{number}.0/24")))
                templates = (replace(TRAP.templates[0], reqid=ReqId(1 + number)),)
                await channel.add_policy(replace(TRAP, selector=selector, templates=templates))
            # nobody reads meanwhile: the loop runs this very function
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((str(NEAR[1]), 0))
                for number in range(POLICIES):
                    sender.sendto(b"x", (f"10.2.{number}.1", 9))
            await until(lambda: len(events) == POLICIES)
            statistics = await channel.statistics()
            assert statistics["overruns"] > 0
            assert statistics["found"] > 0
            found = [event for event in events if isinstance(event, Acquire)]
            assert len({event.reqid for event in found}) == POLICIES
            # what fails blocks nobody: its packets ask again at once, though acq_expires is minutes away
            await channel.acquire_failed(found[0].sequence, errno.EHOSTUNREACH)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((str(NEAR[1]), 0))
                sender.sendto(b"x", (str(found[0].flow.destination) if found[0].flow else "", 9))
            await until(lambda: len(events) > POLICIES)
            again = events[-1]
            assert isinstance(again, Acquire)
            assert again.reqid == found[0].reqid
            await channel.flush_policies()  # else the packets that wait ask again

        within(ends.here, body, event_buffer=1)
        wait_until(lambda: monitor.log().count("acquire"), "the monitor was told")


def test_a_key_manager_that_stalls_brings_the_tunnel_up_all_the_same() -> None:
    """Stopped while more foreign ACQUIREs than it has room for and then its own arrive; the packets that asked arrive once it goes on."""
    with kernel_pair(xfrm, xfrm, Tunnel(start_a="trap", connection_options={"encap": "no"})) as both:
        a = both.link.a
        assert isinstance(a, XfrmGateway)
        assert a.vpnd is not None
        gateway = a.namespace
        near, far, target = both.link.ends(Side.A)
        with monitored(gateway), udp_sink(far, target) as sink:
            gateway.ip(f"route add 10.99.0.0/16 via {both.link.sites.b.wan4}")
            foreign = ["policy", "add", "dst", "10.99.0.0/16", "dir", "out", "tmpl", "proto", "esp", "mode", "transport", "reqid", "9"]
            gateway.run(["ip", "xfrm", *foreign])
            narrow_event_socket(a.vpnd.pid)
            os.kill(a.vpnd.pid, signal.SIGSTOP)
            try:
                flood(gateway, IPv4Network("10.99.0.0/16"), FLOOD)
                assert lost(gateway) > 0
                sent = UdpStream(near, [(target, sink.port)], count=20, rate=100.0).wait()
            finally:
                os.kill(a.vpnd.pid, signal.SIGCONT)
            assert sink.expect(sent.sent, timeout=60.0).received == 20
            assert a.child().packets_out >= 20
            assert both.leaks() == []
