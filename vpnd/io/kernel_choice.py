"""`kernel = auto`: the first kernel that works on this host and can do all that the configuration asks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernel_shim.channel.af_key import AfKeyChannel
from kernel_shim.channel.api import KernelChannel
from kernel_shim.channel.userspace import USERSPACE
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import Capabilities, KernelError
from vpnd.config.capabilities import beyond
from vpnd.config.model import Configuration, DaemonConfig, KernelChoice
from vpnd.io.shim import shim_listens
from vpnd.telemetry.wording import explained

TUN: Final = Path("/dev/net/tun")


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one kernel; `reason` says why it is taken, or why not."""

    kernel: KernelChoice
    usable: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel.value}: {self.reason}"


async def choose(config: DaemonConfig, configuration: Configuration) -> Sequence[Verdict]:
    """One verdict for each kernel up to the one that is taken, which is the last; none is taken when the last is not usable.

    Linux' own IPsec first, for it is the fastest and knows the most; then what is left of it where only AF_KEY leads to it;
    then the userspace kernel, which needs nothing of the host. Looking changes nothing in the host.
    """
    verdicts = []
    for kernel in (KernelChoice.XFRM, KernelChoice.PFKEY, KernelChoice.USERSPACE):
        verdicts.append(await _verdict(kernel, config, configuration))
        if verdicts[-1].usable:
            break
    return verdicts


async def _verdict(kernel: KernelChoice, config: DaemonConfig, configuration: Configuration) -> Verdict:
    try:
        capabilities = _userspace(config) if kernel is KernelChoice.USERSPACE else await _look(_LINUX[kernel]())
    except (KernelError, OSError, TimeoutError) as error:
        return Verdict(kernel, False, explained(error))
    missing = beyond(configuration, capabilities)
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        return Verdict(kernel, False, f"{missing[0].path}: {missing[0].message}{more}")
    return Verdict(kernel, True, "works, and can do all that the configuration asks")


_LINUX: Final[Mapping[KernelChoice, type[XfrmChannel | AfKeyChannel]]] = {KernelChoice.XFRM: XfrmChannel, KernelChoice.PFKEY: AfKeyChannel}


async def _look(channel: KernelChannel) -> Capabilities:
    await channel.open()
    try:
        return channel.capabilities()
    finally:
        await channel.close()


def _userspace(config: DaemonConfig) -> Capabilities:
    if not shim_listens(config.shim_socket):
        if not config.start_shim:
            raise ConnectionRefusedError(f"none listens at {config.shim_socket}, and start_shim = no")
        if not os.access(TUN, os.R_OK | os.W_OK):
            raise FileNotFoundError(f"{TUN} cannot be opened")
    return USERSPACE
