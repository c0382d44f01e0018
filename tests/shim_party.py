"""The two clients of `pfkey_conversation`, on our own server session and data plane, without sockets and on a clock of the test's."""

from __future__ import annotations

from dataplane_pair import Gateway
from pfkey_conversation import FAR, HERE, NEAR
from pfkey_support import PipeSockets
from scapy.layers.inet import IP, UDP

from kernel_shim.packet.virtio import VnetHeader
from kernel_shim.pfkey.codec import header_of
from kernel_shim.pfkey.server import ClientId, ServerSession

_MANAGER, _OTHER = ClientId(1), ClientId(2)
STEP = 0.5  # s
LONGEST = 60.0  # s


class ShimParty:
    def __init__(self) -> None:
        self._engine = Gateway(1).engine
        self._engine.key_manager_listens(False, 0.0)
        self._session = ServerSession(self._engine, PipeSockets(), is_local=lambda address: address == HERE, inspected=self._engine)
        self._now = 100.0
        for client in (_MANAGER, _OTHER):
            self._session.accept(client, pid=0, uid=0, now=self._now)

    def say(self, data: bytes) -> int:
        self._session.receive(_MANAGER, data, self._now)
        return 0

    def heard(self, *, manager: bool) -> list[bytes]:
        client, messages = _MANAGER if manager else _OTHER, list[bytes]()
        while (output := self._session.next_output(client, self._now)) is not None:
            messages.append(output.data)
            self._session.output_sent(client, self._now)
        return messages

    def provoke(self) -> None:
        packet = IP(src=str(NEAR[1]), dst=str(FAR[1])) / UDP(sport=1000, dport=9000) / b"hello"
        self._engine.send(VnetHeader().pack() + bytes(packet), self._now)
        self._engine.flush(self._now)

    def age(self, expected: int) -> list[bytes]:
        until, messages = self._now + LONGEST, list[bytes]()
        while self._now < until and not any(header_of(data).type == expected for data in messages):
            self._now += STEP
            self._engine.tick(self._now)
            self._session.tick(self._now)
            messages += self.heard(manager=True)
        return messages
