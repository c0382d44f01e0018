"""The data plane without a kernel around it: microseconds for each inner packet, sealed and opened, best of several rounds.

python -m bench.dataplane_micro        (with tests/ on the path)
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dataplane_pair import MemorySink, Pair, Sent

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import Endpoint
from kernel_shim.packet import virtio

SEGMENT = 1386  # bytes of an inner packet at an outer MTU of 1500 and some room
ROUNDS = 7
_TCP = 52
_ALGORITHMS = {
    "aes-gcm-128": EspAlgorithm(EncryptionId.AES_GCM_16, 128),
    "aes-gcm-256": EspAlgorithm(EncryptionId.AES_GCM_16, 256),
    "chacha20-poly1305": EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256),
    "aes-cbc-128-sha256": EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA2_256_128),
}


class _Nowhere(MemorySink):
    def send_esp(self, local: Endpoint, remote: Endpoint, buffer: memoryview, segment_size: int, *, whole: bool = True, traffic_class: int = 0) -> None:
        pass

    def write_tun(self, frame: memoryview) -> None:
        pass


def _best(action: Callable[[], int]) -> float:
    """Microseconds a packet; `action` says how many packets it worked off."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        packets = action()
        best = min(best, (time.perf_counter() - begin) / packets)
    return best * 1e6


def _pair(algorithm: EspAlgorithm) -> Pair:
    pair = Pair()
    pair.connect(algorithm=algorithm)
    return pair


def _quiet(pair: Pair) -> None:
    """From now on nobody keeps what comes out."""
    for gateway in (pair.left, pair.right):
        gateway.sink.send_esp = _Nowhere().send_esp  # type: ignore[method-assign]
        gateway.sink.write_tun = _Nowhere().write_tun  # type: ignore[method-assign]


def _offloaded(algorithm: EspAlgorithm) -> tuple[float, float]:
    pair = _pair(algorithm)
    size = SEGMENT - _TCP
    frame = pair.super_frame(bytes(size * 45), size)
    batches: list[list[Sent]] = []
    for _ in range(ROUNDS * 20):
        pair.left.engine.send(frame, pair.now)
        batches.append(pair.left.sent())
    _quiet(pair)
    left, right = pair.left.engine, pair.right.engine
    left.outbound_buffer[: len(frame)] = frame

    def seal() -> int:
        for _ in range(20):
            left.outbound(len(frame), pair.now)
        return 20 * 45

    turns = iter(batches)

    def receive() -> int:
        for _ in range(20):
            for sent in next(turns):
                right.receive(sent.remote, sent.local, sent.data, sent.segment, pair.now)
        return 20 * 45

    return _best(seal), _best(receive)


def _single(algorithm: EspAlgorithm, size: int) -> tuple[float, float]:
    pair = _pair(algorithm)
    frame = virtio.NO_OFFLOAD + pair.packet(1, size)
    datagrams: list[Sent] = []
    for _ in range(ROUNDS):
        for _ in range(200):
            pair.left.engine.send(frame, pair.now)
        pair.left.engine.flush(pair.now)
        datagrams += [Sent(s.local, s.remote, d, len(d)) for s in pair.left.sent() for d in s.datagrams()]
    _quiet(pair)
    left, right = pair.left.engine, pair.right.engine
    left.outbound_buffer[: len(frame)] = frame

    def seal() -> int:
        for _ in range(200):
            left.outbound(len(frame), pair.now)
        left.flush(pair.now)
        return 200

    turns = iter(datagrams)

    def receive() -> int:
        for _ in range(200):
            sent = next(turns)
            right.receive(sent.remote, sent.local, sent.data, sent.segment, pair.now)
        return 200

    return _best(seal), _best(receive)


def run() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def row(name: str, value: float) -> None:
        figures: dict[str, object] = {"ours": round(value, 3), "peer": None, "ratio": None, "floor": None, "aim": None, "met": True, "runs": []}
        rows.append({"name": name, "unit": "us/packet", "better": "low", **figures})

    for name, algorithm in _ALGORITHMS.items():
        sealed, opened = _offloaded(algorithm)
        row(f"dataplane-micro.{name}.seal", sealed)
        row(f"dataplane-micro.{name}.open", opened)
    for size in (64, 1358):
        sealed, opened = _single(_ALGORITHMS["aes-gcm-128"], size)
        row(f"dataplane-micro.single-{size}.seal", sealed)
        row(f"dataplane-micro.single-{size}.open", opened)
    return rows


if __name__ == "__main__":
    for line in run():
        print(f"{line['name']:45s} {line['ours']} {line['unit']}")
