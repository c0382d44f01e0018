"""The two clients of `pfkey_conversation`, on Linux' AF_KEY in a namespace."""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from typing import Final

from lab.namespaces import Namespace
from pfkey_conversation import FAR, NEAR

from kernel_shim.channel.af_key_socket import open_af_key
from kernel_shim.pfkey.codec import header_of

EXPIRE_SECONDS: Final = 60.0


class AfKeyParty:
    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._manager, self._other = namespace.call(open_af_key), namespace.call(open_af_key)

    def close(self) -> None:
        self._manager.close()
        self._other.close()

    def say(self, data: bytes) -> int:
        try:
            self._manager.send(data)
        except OSError as error:
            return error.errno or 0
        return 0

    def heard(self, *, manager: bool) -> list[bytes]:
        """The kernel answers within the call, so what there is to hear is there."""
        opened, messages = self._manager if manager else self._other, list[bytes]()
        with suppress(BlockingIOError):
            while True:
                messages.append(opened.recv(1 << 16))
        return messages

    def provoke(self) -> None:
        with self._namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((str(NEAR[1]), 0))
            with suppress(OSError):  # who gives up makes the kernel refuse
                sender.sendto(b"hello", (str(FAR[1]), 9000))

    def age(self, expected: int) -> list[bytes]:
        messages: list[bytes] = []
        while not any(header_of(data).type == expected for data in messages):
            if not select.select([self._manager], [], [], EXPIRE_SECONDS)[0]:
                break
            messages += self.heard(manager=True)
        return messages
