"""Two engines as PE routers back to back, with the VRFs red and blue; the test plays key manager."""

from __future__ import annotations

import random
from ipaddress import ip_address, ip_network

from dataplane_pair import OUTER, Gateway, Pair, policy_pair
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from kernel_shim.model import Mode
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, Tunnel, Vrf, VrfRoute
from kernel_shim.packet import virtio

RED, BLUE, OTHERS = 100, 200, 900
HERE, THERE = "10.0.0.0/24", "10.0.1.0/24"


def allowed(*labels: int) -> LabelSet:
    return LabelSet(LabelRange(Label(label), Label(label)) for label in labels)


def packet(number: int = 0, size: int = 64, left: bool = True, version: int = 4, ttl: int = 60, dscp: int = 0, df: bool = True) -> bytes:
    body = Raw(number.to_bytes(4, "big") + random.Random(number).randbytes(size))
    upper = UDP(sport=1000, dport=2000) / body
    if version == 6:
        source, destination = ("2001:db8:a::1", "2001:db8:b::1") if left else ("2001:db8:b::1", "2001:db8:a::1")
        return bytes(IPv6(src=source, dst=destination, hlim=ttl, tc=dscp << 2) / upper)
    source, destination = ("10.0.0.5", "10.0.1.5") if left else ("10.0.1.5", "10.0.0.5")
    return bytes(IP(src=source, dst=destination, ttl=ttl, tos=dscp << 2, flags="DF" if df else 0) / upper)


class Pes(Pair):
    """Both have the VRFs red and blue, with the same addresses in each."""

    def __init__(self, encapsulation: Encapsulation = Encapsulation.GRE, mode: Mode = Mode.TRANSPORT, outer: int = 4, ttl: TtlModel = TtlModel.PIPE) -> None:
        super().__init__(outer=outer, mode=Mode.TRANSPORT)
        if mode is Mode.TUNNEL:
            super().__init__(outer=outer, policies=False)
            self.nets = OUTER[outer]
            hosts = tuple(f"{address}/{32 if outer == 4 else 128}" for address in OUTER[outer])
            self.protect(hosts)
        self.ttl = ttl
        for gateway, (local, remote), (mine, theirs), peer in (
            (self.left, OUTER[outer], (HERE, THERE), "right"),
            (self.right, OUTER[outer][::-1], (THERE, HERE), "left"),
        ):
            put = gateway.engine.put_label_entry
            put(Tunnel(peer, ip_address(local), ip_address(remote), encapsulation), self.now)
            put(Peer(peer, allowed(RED, BLUE)), self.now)
            for vrf, label in (("red", RED), ("blue", BLUE)):
                put(Vrf(vrf, f"vpn-{vrf}"), self.now)
                put(LabelBinding(Label(label), (Nhlfe(ToVrf(vrf), ttl=ttl),)), self.now)
                put(VrfRoute(vrf, ip_network(mine), (Nhlfe(ToInterface(vrf)),)), self.now)
                put(VrfRoute(vrf, ip_network(theirs), (Nhlfe(ToPeer(peer), (Label(label),), ttl),)), self.now)
                for prefix, hop in (("2001:db8:a::/48", peer == "right"), ("2001:db8:b::/48", peer == "left")):
                    path = Nhlfe(ToInterface(vrf)) if hop else Nhlfe(ToPeer(peer), (Label(label),), ttl)
                    put(VrfRoute(vrf, ip_network(prefix), (path,)), self.now)

    def protect(self, hosts: tuple[str, ...]) -> None:
        for gateway, (mine, theirs), (here, there) in (
            (self.left, hosts, OUTER[self.outer]),
            (self.right, hosts[::-1], OUTER[self.outer][::-1]),
        ):
            for policy in policy_pair(mine, theirs, here, there):
                gateway.engine.add_policy(policy, self.now)

    def put(self, vrf: str, *frames: bytes, left: bool = True, raw: bool = False) -> None:
        engine = (self.left if left else self.right).engine
        for frame in frames:
            frame = frame if raw else virtio.NO_OFFLOAD + frame
            engine.outbound_buffer[: len(frame)] = frame
            engine.from_vrf(vrf, len(frame), self.now)
        engine.flush(self.now)

    def plaintext(self, gateway: Gateway) -> list[bytes]:
        """What is in the ESP packets that it sent."""
        cipher = self.cipher(gateway is self.left)
        out = []
        for item in gateway.sink.esp:
            for datagram in item.datagrams():
                buffer = bytearray(len(datagram) - cipher.shape.overhead)
                assert cipher.open(int.from_bytes(datagram[4:8], "big"), memoryview(datagram), memoryview(buffer))
                out.append(bytes(buffer[: len(buffer) - 2 - buffer[-2]]))
        return out
