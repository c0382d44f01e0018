"""`kernel-shim sad|spd|pending|bundles|labels|stats|monitor` against the engine behind a socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from dataplane_pair import Gateway, addresses
from pfkey_support import GCM, SocketEdge
from scapy.layers.inet import IP, UDP

from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.dataplane.engine import Engine
from kernel_shim.io.main import main
from kernel_shim.model import (
    Action,
    AddressRange,
    Direction,
    Expire,
    Mode,
    Policy,
    ReqId,
    SaId,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
    Template,
    UdpEncapsulation,
)
from kernel_shim.mpls.labels import Label
from kernel_shim.mpls.lfib import Nhlfe, ToVrf
from kernel_shim.mpls.node import LabelBinding, Vrf
from kernel_shim.packet.virtio import VnetHeader
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import MessageType
from kernel_shim.pfkey.event_messages import expire_message
from kernel_shim.pfkey.messages import Message
from kernel_shim.secret import Secret
from kernel_shim.tool.monitor import Monitor, json_line, monitor, open_shim, text_line

KEY = bytes(range(0xA0, 0xB0))
LEFT, RIGHT = addresses("192.0.2.1/32").first, addresses("192.0.2.2/32").first


def policy(remote: str, reqid: int) -> Policy:
    template = Template(Mode.TUNNEL, ReqId(reqid), LEFT, RIGHT)
    return Policy(Selector(addresses("10.1.0.0/16"), addresses(remote)), Direction.OUT, Action.PROTECT, 1000, (template,))


def outbound(spi: int, reqid: int) -> SecurityAssociation:
    return SecurityAssociation(
        Spi(spi), LEFT, RIGHT, Direction.OUT, Mode.TUNNEL, ReqId(reqid), GCM, Secret(KEY + spi.to_bytes(4, "big")), encapsulation=UdpEncapsulation()
    )


def send(engine: Engine, destination: str, now: float) -> None:
    engine.send(VnetHeader().pack() + bytes(IP(src="10.1.0.1", dst=destination) / UDP(sport=1000, dport=2000) / b"hello"), now)
    engine.flush(now)


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[SocketEdge]:
    edge = SocketEdge(tmp_path / "kernel", Gateway(1).engine)
    yield edge
    edge.close()


@pytest.fixture
async def channel(edge: SocketEdge, tmp_path: Path) -> AsyncIterator[PfKeyChannel]:
    """A key manager, with one tunnel that stands and one that packets wait for."""
    channel = PfKeyChannel(tmp_path / "kernel")
    await channel.open()
    await channel.add_policy(policy("10.2.0.0/16", 1))
    await channel.add_policy(policy("10.3.0.0/16", 2))
    await channel.add_sa(outbound(0x1000, 1))
    yield channel
    await channel.close()


async def run(tmp_path: Path, *words: str) -> int:
    return await asyncio.to_thread(main, [*words, "--socket", str(tmp_path / "kernel")])


async def values(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> Any:
    assert await run(tmp_path, command, "--json") == 0
    return json.loads(capsys.readouterr().out)


async def test_sad(channel: PfKeyChannel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spi = await channel.get_spi(SpiRequest(RIGHT, LEFT, Mode.TUNNEL, ReqId(1)))
    standing, larval = await values(tmp_path, capsys, "sad")
    assert (standing["spi"], standing["direction"], standing["state"], standing["algorithm"]) == ("00001000", "out", "mature", "aes-gcm-16-128")
    assert (larval["spi"], larval["state"], larval["algorithm"]) == (f"{spi:08x}", "larval", None)
    assert await run(tmp_path, "sad") == 0
    assert "aes-gcm-16-128" in capsys.readouterr().out


async def test_spd(channel: PfKeyChannel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = await values(tmp_path, capsys, "spd")
    assert [row["selector"] for row in rows] == ["10.1.0.0/16 => 10.2.0.0/16", "10.1.0.0/16 => 10.3.0.0/16"]
    assert rows[0]["templates"][0] == {"mode": "tunnel", "source": "192.0.2.1", "destination": "192.0.2.2", "reqid": 1, "level": "unique"}
    assert await run(tmp_path, "spd") == 0
    assert "10.1.0.0/16 => 10.3.0.0/16" in capsys.readouterr().out


async def test_pending(channel: PfKeyChannel, edge: SocketEdge, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await values(tmp_path, capsys, "pending") == []
    now = asyncio.get_running_loop().time()
    for last in (1, 1, 2):
        send(engine_of(edge), f"10.3.0.{last}", now)
    (row,) = await values(tmp_path, capsys, "pending")
    assert (row["selector"], row["flows"], row["packets"], row["destination"]) == ("10.1.0.0/16 => 10.3.0.0/16", 2, 3, "192.0.2.2")
    assert row["acquire"] >= 1
    assert await run(tmp_path, "pending") == 0
    assert "10.1.0.0/16 => 10.3.0.0/16" in capsys.readouterr().out


def engine_of(edge: SocketEdge) -> Engine:
    kernel = edge.kernel
    assert isinstance(kernel, Engine)
    return kernel


async def test_bundles(channel: PfKeyChannel, edge: SocketEdge, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await values(tmp_path, capsys, "bundles") == []
    now = asyncio.get_running_loop().time()
    send(engine_of(edge), "10.2.0.1", now)
    send(engine_of(edge), "10.9.0.1", now)
    protected, bypassed = await values(tmp_path, capsys, "bundles")
    assert (protected["destination"], protected["selector"], protected["sa"]["spi"]) == ("10.2.0.1", "10.1.0.0/16 => 10.2.0.0/16", "00001000")
    assert protected["source_port"] is None, "no policy reads ports"
    assert protected["limit"] > 1280
    assert (bypassed["destination"], bypassed["policy"], bypassed["sa"]) == ("10.9.0.1", None, None)
    await channel.delete_sa(SaId(RIGHT, Spi(0x1000)))
    assert await values(tmp_path, capsys, "bundles") == [], "what is not current any more is not shown"
    assert await run(tmp_path, "bundles") == 0
    assert "the cache is empty" in capsys.readouterr().out


async def test_labels(channel: PfKeyChannel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await values(tmp_path, capsys, "labels") == []
    binding = LabelBinding(Label(100), (Nhlfe(ToVrf("red")),))
    await channel.put_labels([Vrf("red", "vpn-red", 101, ("eth1", "eth2")), binding])
    vrf, label = await values(tmp_path, capsys, "labels")
    assert vrf == {"kind": "vrf", "name": "red", "what": "interface vpn-red, table 101, members eth1 eth2"}
    assert label == {"kind": "label", "name": "100", "what": "looked up in VRF red (uniform)"}
    assert await run(tmp_path, "labels") == 0
    assert "looked up in VRF red" in capsys.readouterr().out


async def test_stats(channel: PfKeyChannel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (await values(tmp_path, capsys, "stats"))["policies"] == 2
    assert await run(tmp_path, "stats") == 0
    assert "policies" in capsys.readouterr().out


async def test_a_dump_of_the_cache_is_a_snapshot_of_any_size(channel: PfKeyChannel, edge: SocketEdge) -> None:
    await channel.add_policy(Policy(Selector(AddressRange.everything(4), addresses("10.4.0.0/16")), Direction.OUT, Action.BYPASS, 1))
    now = asyncio.get_running_loop().time()
    for number in range(1000):
        send(engine_of(edge), f"10.4.{number >> 8}.{number & 0xFF}", now)
    bundles = await channel.cached_bundles()
    assert [int(bundle.destination or 0) & 0xFFFF for bundle in bundles] == list(range(1000))


def test_no_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("sad", "spd", "pending", "bundles", "labels", "stats", "monitor"):
        assert main([command, "--socket", str(tmp_path / "none")]) == 1
        assert "no kernel answers" in capsys.readouterr().err


def test_what_another_kernel_does_not_have_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for command, kernel in (("pending", "xfrm"), ("bundles", "xfrm"), ("labels", "pfkey"), ("monitor", "xfrm")):
        assert main([command, "--kernel", kernel]) == 1
        assert kernel in capsys.readouterr().err


async def test_monitor(channel: PfKeyChannel, edge: SocketEdge, tmp_path: Path) -> None:
    lines: list[str] = []
    watching = asyncio.create_task(asyncio.to_thread(monitor, open_shim(tmp_path / "kernel"), as_json=True, show=lines.append))
    async with asyncio.timeout(60):
        while (await channel.statistics())["pfkey.promiscuous"] == 0:
            await asyncio.sleep(0)
        await channel.add_sa(outbound(0x2000, 2))
        send(engine_of(edge), "10.3.0.1", asyncio.get_running_loop().time())
        while not any('"GET"' in line for line in lines):
            await channel.get_sa(SaId(RIGHT, Spi(0x2000)))
    edge.close()
    with pytest.raises(ConnectionResetError):
        await watching
    told = [json.loads(line) for line in lines]
    adds = [message for message in told if message.get("type") == "ADD"]
    assert len(adds) == 2, "the request and its reply"
    assert adds[0]["extensions"]["SA"]["spi"] == "00002000"
    assert adds[0]["extensions"]["X_SA"]["algorithm"] == "aes-gcm-16-128"
    assert KEY.hex() not in "".join(lines)


async def test_monitor_shows_events_on_one_line(edge: SocketEdge, tmp_path: Path) -> None:
    watching = await asyncio.to_thread(lambda: Monitor(open_shim(tmp_path / "kernel")))
    engine = engine_of(edge)
    engine.add_policy(policy("10.3.0.0/16", 2), 0.0)
    send(engine, "10.3.0.1", 0.0)
    edge.send_ready()
    data = await asyncio.to_thread(next, watching.messages())
    line = text_line(data, 0.0)
    assert "ACQUIRE ESP" in line
    assert "10.1.0.1[1000] => 10.3.0.1[2000]" in line
    assert "\n" not in line
    assert json.loads(json_line(data, 1.5))["time"] == 1.5
    watching.close()


def test_a_malformed_message_is_a_line_too() -> None:
    assert "malformed" in text_line(b"\x02\x00", 0.0)
    assert "malformed" in json.loads(json_line(b"", 0.0))


def test_expire_is_about_an_sa() -> None:
    line = text_line(Codec().encode(expire_message(Expire(SaId(RIGHT, Spi(0xABC)), ReqId(1), hard=True))), 0.0)
    assert "EXPIRE ESP" in line
    assert "spi=00000abc" in line
    assert "from the kernel" in line


def test_what_a_kernel_tells_everybody_twice_is_shown_once() -> None:
    """Linux sends a promiscuous socket what it sends to all, and then the copy (pfkey_broadcast)."""
    kernel, opened = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    codec = Codec()
    answers = [codec.encode(Message(MessageType.REGISTER, 0, 0, 1, os.getpid())), codec.encode(Message(MessageType.X_PROMISC, 1, 0, 2, os.getpid()))]
    flush = codec.encode(Message(MessageType.FLUSH, 3, 0, 9, 77))
    other = codec.encode(Message(MessageType.X_SPDFLUSH, 0, 0, 10, 77))
    with kernel:
        for data in (*answers, flush, flush, flush, flush, other, flush):
            kernel.send(data)
        watching = Monitor(opened, doubled=True)
        messages = watching.messages()
        assert [next(messages) for _ in range(4)] == [flush, flush, other, flush]
        watching.close()
