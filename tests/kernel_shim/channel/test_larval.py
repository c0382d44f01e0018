"""However many requests and answers are lost, a larval SA that was removed is gone, and none that the removal made stands in its place."""

from __future__ import annotations

import asyncio
import errno
import random
from contextlib import suppress

import pytest

from kernel_shim.channel.larval import Removal
from kernel_shim.model import KernelError, Spi

REPEATS = 3  # of a request without an answer
ENDS = "one flow's"

pytestmark = pytest.mark.property


class Kernel:
    """net/xfrm/xfrm_state.c as far as larval SAs of one flow go: `xfrm_find_acq` takes one without SPI, or makes one. `numbered`: or that of the ACQUIRE."""

    def __init__(self, draw: random.Random, loss: float, *, numbered: bool) -> None:
        self.draw, self.loss, self.numbered = draw, loss, numbered
        self.larval: list[list[int]] = [[7, 0]]  # the number of its ACQUIRE and its SPI

    async def claim(self, spi: Spi) -> Spi:
        return Spi(await self._ask(lambda: self._claim(spi)))

    async def delete(self, spi: Spi) -> None:
        await self._ask(lambda: self._delete(spi))

    async def _ask(self, request: object) -> int:
        await asyncio.sleep(0)
        for _ in range(REPEATS):
            if self.draw.random() < self.loss:
                continue
            try:
                answer, error = request(), None  # type: ignore[operator]
            except KernelError as raised:
                answer, error = 0, raised
            if self.draw.random() < self.loss:
                continue
            if error is not None:
                raise error
            return int(answer)
        raise TimeoutError("no answer")

    def _claim(self, spi: int) -> int:
        found = next((larval for larval in self.larval if self.numbered and larval[0] == 7), None)
        found = found or next((larval for larval in self.larval if not larval[1]), None)
        if found is None:
            found = [0, 0]
            self.larval.append(found)
        if not found[1]:
            if any(larval[1] == spi for larval in self.larval):
                raise KernelError(errno.ENOENT, "no SPI is free")
            found[1] = spi
        return found[1] if self.numbered else spi

    def _delete(self, spi: int) -> int:
        self.larval = [larval for larval in self.larval if larval[1] != spi]
        return 0


@pytest.mark.parametrize("numbered", [True, False], ids=["xfrm", "af_key"])
@pytest.mark.parametrize("loss", [0.0, 0.1, 0.3, 0.5])
async def test_nothing_is_left_of_it(loss: float, numbered: bool) -> None:
    for seed in range(100):
        kernel = Kernel(random.Random(seed), loss, numbered=numbered)
        removal = Removal()
        for _ in range(1000):
            with suppress(TimeoutError):
                await removal.remove(ENDS, kernel.claim, kernel.delete)
                break
        else:
            raise AssertionError("it never goes")
        assert kernel.larval == [], seed


@pytest.mark.parametrize("numbered", [True, False], ids=["xfrm", "af_key"])
async def test_two_at_once_leave_nothing_either(numbered: bool) -> None:
    """Each asks until it is told that it is done."""
    for seed in range(200):
        kernel = Kernel(random.Random(seed), 0.3, numbered=numbered)
        removal = Removal()

        async def until_done(kernel: Kernel = kernel, removal: Removal = removal) -> None:
            for _ in range(1000):
                with suppress(TimeoutError):
                    await removal.remove(ENDS, kernel.claim, kernel.delete)
                    return

        await asyncio.gather(until_done(), until_done())
        assert kernel.larval == [], seed


async def test_what_the_kernel_refuses_comes_out() -> None:
    async def claim(spi: Spi) -> Spi:
        raise KernelError(errno.EPERM, "not for you")

    async def delete(spi: Spi) -> None:
        raise AssertionError("nothing stands")

    with pytest.raises(KernelError, match="not for you"):
        await Removal().remove(ENDS, claim, delete)
