"""NetlinkSocket against this machine's own kernel: every request ends, whatever the socket loses."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network

import pytest
from lab.namespaces import Lab

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.channel.netlink import MAX_UNDER_WAY, NetlinkSocket
from kernel_shim.model import Action, AddressRange, Direction, KernelError, Mode, Policy, ReqId, Selector, Template
from kernel_shim.xfrm.constants import Group, MessageType
from kernel_shim.xfrm.policies import policy_dump_message, policy_id_message, policy_message
from kernel_shim.xfrm.wire import Message

pytestmark = pytest.mark.root


def policy(number: int) -> Policy:
    selector = Selector(AddressRange.of(IPv4Network("10.1.0.0/16")), AddressRange.of(IPv4Network(f"10.2.{number}.0/24")))
    template = Template(Mode.TUNNEL, ReqId(1), IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"))
    return Policy(selector, Direction.OUT, Action.PROTECT, 1000, (template,))


def alone(body: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine on a loop in a fresh namespace."""

    async def run() -> None:
        async with asyncio.timeout(60):
            await body()

    with Lab() as lab:
        lab.namespace("netlink").call(lambda: asyncio.run(run()))


def test_answers_that_the_socket_lost_are_asked_for_again() -> None:
    async def body() -> None:
        overruns = []
        requests = NetlinkSocket(receive_buffer=1, on_overrun=lambda: overruns.append(True))
        requests.open()
        messages = [policy_message(policy(number), replace=True) for number in range(2 * MAX_UNDER_WAY)]
        await asyncio.gather(*(requests.request(message) for message in messages))
        assert overruns
        assert requests.overruns
        assert len(await requests.request(policy_dump_message())) == len(messages)
        requests.close()

    alone(body)


def test_a_request_that_must_not_be_repeated_says_that_its_answer_is_lost() -> None:
    async def body() -> None:
        requests = NetlinkSocket(receive_buffer=1)
        requests.open()
        messages = [policy_message(policy(number), replace=False) for number in range(MAX_UNDER_WAY)]
        outcomes = await asyncio.gather(*(requests.request(message, repeat=False) for message in messages), return_exceptions=True)
        assert any(isinstance(outcome, TimeoutError) for outcome in outcomes)
        assert all(outcome == [] or isinstance(outcome, TimeoutError) for outcome in outcomes)
        # each had its effect all the same: to look is how a caller knows
        assert len(await requests.request(policy_dump_message())) == MAX_UNDER_WAY
        requests.close()

    alone(body)


def test_a_refusal_carries_errno_and_the_kernels_words() -> None:
    async def body() -> None:
        requests = NetlinkSocket()
        requests.open()
        with pytest.raises(KernelError) as refused:
            await requests.request(policy_id_message(MessageType.DELPOLICY, Direction.OUT, policy(1).selector))
        assert refused.value.errno == errno.ENOENT
        with pytest.raises(KernelError) as refused:
            await requests.request(Message(MessageType.DELSA, bytes(24), flags=5))
        assert refused.value.errno in (errno.ESRCH, errno.EINVAL)
        assert refused.value.detail
        requests.close()

    alone(body)


def test_what_is_under_way_ends_with_the_socket() -> None:
    async def body() -> None:
        requests = NetlinkSocket()
        requests.open()
        silent = asyncio.ensure_future(_never_answered(requests))
        await asyncio.sleep(0)
        requests.close()
        with pytest.raises(ChannelClosed):
            await silent
        with pytest.raises(ChannelClosed):
            await requests.request(policy_dump_message())

    alone(body)


async def _never_answered(requests: NetlinkSocket) -> list[Message]:
    """Without the flag ACK the kernel does the work and says nothing."""
    message = policy_message(policy(1), replace=True)
    return await requests.request(Message(message.type, message.body, message.attributes, flags=1))


def test_a_request_without_answer_times_out() -> None:
    async def body() -> None:
        requests = NetlinkSocket()
        requests.open()
        message = policy_message(policy(1), replace=True)
        with pytest.raises(TimeoutError):
            await requests.request(Message(message.type, message.body, message.attributes, flags=1), timeout=0.01)
        assert requests.timeouts == 3
        requests.close()

    alone(body)


def test_what_is_multicast_reaches_the_listener_in_order() -> None:
    async def body() -> None:
        heard: list[int] = []
        listener = NetlinkSocket((Group.POLICY,), on_message=lambda message: heard.append(message.type))
        requests = NetlinkSocket()
        for each in (listener, requests):
            each.open()
        await requests.request(policy_message(policy(1), replace=False))
        await requests.request(policy_message(policy(1), replace=True))
        await requests.request(policy_id_message(MessageType.DELPOLICY, Direction.OUT, policy(1).selector))
        while len(heard) < 3:
            await asyncio.sleep(0)
        assert heard == [MessageType.NEWPOLICY, MessageType.UPDPOLICY, MessageType.DELPOLICY]
        for each in (listener, requests):
            each.close()

    alone(body)


async def test_a_kernel_that_does_not_let_us_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(socket.socket):
        def bind(self, _address: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(NetlinkSocket, "socket_type", Refused)
    requests = NetlinkSocket()
    with pytest.raises(KernelError, match="CAP_NET_ADMIN is needed"):
        requests.open()
    assert not requests.is_open
