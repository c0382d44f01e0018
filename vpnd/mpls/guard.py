"""Labels leave and come in SAs alone: what stands behind the policies of a tunnel where the kernel does not see to it itself.

The kernel that encapsulates knows nothing of IPsec: without a policy it would send labels in clear, and take them so from whoever forges the
peer's address. So a policy of the last priority drops what no other policy protects. It names port 0 on both sides, which is what an XFRM
lookup sees of GRE without a key and of every protocol without ports (net/xfrm.h, xfrm_flowi_sport): so it is another selector than that of a
child for the same protocol, of which the kernel has one only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from kernel_shim.channel.linux_mpls.detour import MARK
from kernel_shim.model import Action, AddressRange, Direction, Mark, Policy, PortRange, Selector
from kernel_shim.mpls.node import Tunnel

PRIORITY_FIRST: Final = 0
PRIORITY_LAST: Final = 0xFFFFFFFF

_PORTLESS: Final = PortRange(0, 0)


def without_sa(tunnel: Tunnel) -> Iterator[Policy]:
    """The policies that drop what the tunnel would send or take in clear; none for a network that is said to be managed.

    Over IPv6 one more: what has the mark of the detour (`kernel_shim.channel.linux_mpls.detour`) passes, and meets the others when it comes back.
    """
    near, far = AddressRange(tunnel.local, tunnel.local), AddressRange(tunnel.remote, tunnel.remote)
    outbound = Selector(near, far, int(tunnel.encapsulation), _PORTLESS, _PORTLESS)
    if tunnel.local.version == 6:
        yield Policy(replace(outbound, mark=Mark(MARK, 0xFFFFFFFF)), Direction.OUT, Action.BYPASS, PRIORITY_FIRST)
    if tunnel.managed:
        return
    yield Policy(outbound, Direction.OUT, Action.DISCARD, PRIORITY_LAST)
    yield Policy(outbound.reversed(), Direction.IN, Action.DISCARD, PRIORITY_LAST)
