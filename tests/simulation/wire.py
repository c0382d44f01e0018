"""The network between simulated gateways: delay, loss, reordering and doubling, from a seed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from kernel_shim.model import PORT_NAT_T, Endpoint, IPAddress


class Station(Protocol):
    def ike(self, local: Endpoint, remote: Endpoint, data: bytes) -> None: ...
    def esp(self, local: Endpoint, remote: Endpoint, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Weather:
    """`delay` in seconds, one way, at least and at most: the difference reorders. The rest are shares of datagrams."""

    delay: tuple[float, float] = (0.005, 0.015)
    loss: float = 0.0
    esp_loss: float | None = None  # None: as IKE's
    doubled: float = 0.0


CLEAR: Final = Weather()


class Wire:
    """Every address belongs to one station. `counts` has what was sent, lost and doubled, of `ike` and `esp`; `esp.repeated`: numbers used twice."""

    def __init__(self, seed: int, weather: Weather = CLEAR) -> None:
        self._dice: Final = random.Random(seed)
        self.weather = weather
        self.stations: Final[dict[IPAddress, Station]] = {}
        self.counts: Final[Counter[str]] = Counter()
        self._numbers: dict[tuple[IPAddress, bytes], int] = {}  # the last of each SA out
        self._earlier: dict[tuple[IPAddress, bytes], int] = {}

    def carry_ike(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        station = self.stations.get(remote.address)
        if station is not None:
            self._carry("ike", lambda: station.ike(remote, local, data))

    def carry_esp(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        station = self.stations.get(remote.address)
        key, number = (remote.address, data[:4]), int.from_bytes(data[4:8], "big")
        # a sequence number that does not grow would be a second packet under the same key and nonce
        if number <= self._numbers.get(key, self._earlier.get(key, 0)):
            self.counts["esp.repeated"] += 1
        self._numbers[key] = number
        if station is not None and remote.port == PORT_NAT_T:
            self._carry("esp", lambda: station.esp(remote, local, data))

    def forget_numbers(self) -> None:
        """Of SAs that have sent nothing since the last call."""
        self._earlier, self._numbers = self._numbers, {}

    def _carry(self, kind: str, arrive: Callable[[], None]) -> None:
        counts, weather, dice = self.counts, self.weather, self._dice
        counts[f"{kind}.sent"] += 1
        loss = weather.esp_loss if kind == "esp" and weather.esp_loss is not None else weather.loss
        if loss and dice.random() < loss:
            counts[f"{kind}.lost"] += 1
            return
        loop = asyncio.get_running_loop()
        loop.call_later(dice.uniform(*weather.delay), arrive)
        if weather.doubled and dice.random() < weather.doubled:
            counts[f"{kind}.doubled"] += 1
            loop.call_later(dice.uniform(*weather.delay), arrive)
