"""Sealed packets on their way to one sendmsg."""

from __future__ import annotations

from typing import Final

from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.esp.rows import MAX_DATAGRAMS, MAX_ROWS
from kernel_shim.sa.entry import SaEntry

# Limits of this implementation: SAs with an open batch at once; 64 kB each.
OPEN_BATCHES: Final = 64


class Batch:
    __slots__ = ("buffer", "count", "end", "entry", "segment", "traffic_class")

    def __init__(self) -> None:
        self.buffer: Final = memoryview(bytearray(MAX_DATAGRAMS))
        self.entry: SaEntry
        self.end = self.count = self.segment = self.traffic_class = 0


class Batches:
    """One open batch for each SA. A batch holds datagrams of one size and traffic class, the last may be shorter (UDP_SEGMENT).

    An SA's packets leave in the order of their sequence numbers: a batch of the SA is sent before anything else of it is.
    """

    def __init__(self, sink: Sink, traffic: Traffic) -> None:
        self._sink, self._traffic = sink, traffic
        self._open: dict[int, Batch] = {}
        self._free: list[Batch] = []

    def slot(self, entry: SaEntry, length: int, traffic_class: int = 0) -> memoryview:
        """Where the next packet of `entry`, of `length` bytes, is to be sealed."""
        batch = self._open.get(entry.serial)
        if batch is not None and (
            batch.count == MAX_ROWS
            or length > batch.segment
            or batch.end % batch.segment
            or batch.end + length > MAX_DATAGRAMS
            or traffic_class != batch.traffic_class
        ):
            self._send(batch)
            batch.end = batch.count = 0
        elif batch is None:
            if len(self._open) >= OPEN_BATCHES:
                self.flush_all()
            batch = self._free.pop() if self._free else Batch()
            batch.entry = entry
            self._open[entry.serial] = batch
        if not batch.count:
            batch.segment, batch.traffic_class = length, traffic_class
        begin = batch.end
        batch.end = begin + length
        batch.count += 1
        return batch.buffer[begin : batch.end]

    def flush(self, entry: SaEntry) -> None:
        batch = self._open.pop(entry.serial, None)
        if batch is not None:
            self._close(batch)

    def flush_all(self) -> None:
        while self._open:
            self._close(self._open.pop(next(iter(self._open))))

    def flush_in_fragments(self, entry: SaEntry) -> None:
        """Send the SA's batch, which holds one packet over the path's MTU."""
        self._close(self._open.pop(entry.serial), whole=False)

    def _close(self, batch: Batch, *, whole: bool = True) -> None:
        self._send(batch, whole=whole)
        batch.end = batch.count = 0
        del batch.entry
        self._free.append(batch)

    def _send(self, batch: Batch, *, whole: bool = True) -> None:
        entry = batch.entry
        self._traffic.out_sends += 1
        whole = whole and entry.sa.copies.df
        self._sink.send_esp(entry.local, entry.remote, batch.buffer[: batch.end], batch.segment, whole=whole, traffic_class=batch.traffic_class)
