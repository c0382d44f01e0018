"""What a label tunnel sends over IPv6 goes by the detour, or in an SA, or nowhere: an nftables table of ours, in which the tunnels' ends are.

The policy that lets the detour pass (`vpnd.mpls.guard`) says nothing of where to: it is a rule that leads there, and a rule can be taken away by others.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Collection, Set
from contextlib import closing
from ipaddress import ip_address
from typing import Final

from kernel_shim.channel.linux_mpls.detour import NEAR
from kernel_shim.model import IPAddress, KernelError
from kernel_shim.mpls.node import Tunnel
from kernel_shim.nft import Nft

TABLE: Final = "ip6 vpnd-labels"
_ENDS: Final = f"{TABLE} ends"
_CHAIN: Final = f"{TABLE} leaving"
_GRE: Final = "meta l4proto 47"  # by its number: a host without /etc/protocols has no name for it
_RULE: Final = f'{_GRE} oifname != "{NEAR}" rt ipsec missing ip6 saddr . ip6 daddr @ends counter'
_PAIR: Final = re.compile(r"([0-9a-f:.]+) \. ([0-9a-f:.]+)")


async def raise_shield(tunnels: Collection[Tunnel]) -> None:
    """Over all of them, and none else, from one moment to the next; over none it is gone. KernelError when one is needed and there is no nftables."""
    if not tunnels:
        try:
            await _run(f"add table {TABLE}\ndelete table {TABLE}\n")
        except KernelError as error:
            if error.errno != errno.ENOSYS:
                raise
        return
    ends = ", ".join(f"{tunnel.local} . {tunnel.remote}" for tunnel in tunnels)
    await _run(
        f"""add table {TABLE}
add set {_ENDS} {{ type ipv6_addr . ipv6_addr; }}
flush set {_ENDS}
add element {_ENDS} {{ {ends} }}
add chain {_CHAIN} {{ type filter hook output priority 0; }}
flush chain {_CHAIN}
add rule {_CHAIN} {_RULE} drop
"""
    )


async def shielded() -> Set[tuple[IPAddress, IPAddress]]:
    """The ends, near and far, of what it is over; none unless it is whole."""
    try:
        told = (await _run(f"list table {TABLE}\n")).replace("meta l4proto gre", _GRE)
    except KernelError:
        return frozenset()
    if _RULE not in told or "hook output" not in told:
        return frozenset()
    return frozenset((ip_address(near), ip_address(far)) for near, far in _PAIR.findall(told))


async def _run(commands: str) -> str:
    def run() -> str:
        with closing(Nft()) as nft:
            return nft.run(commands)

    return await asyncio.to_thread(run)  # thousands of tunnels take it a second
