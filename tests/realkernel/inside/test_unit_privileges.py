"""vpnd on the real kernel with the capabilities that its systemd unit leaves it, and no other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

import pytest
from lab.confined import mask
from lab.gateway import REPOSITORY
from lab.namespaces import Namespace
from lab.pairing import DaemonFactory
from lab.tunnel import Tunnel
from realkernel.kernel_gateways import KernelGateway, PfKeyGateway, XfrmGateway, kernel_pair, pfkey, xfrm

pytestmark = pytest.mark.realkernel

UNIT: Final = REPOSITORY / "deploy" / "systemd" / "vpnd-linux.service"
NOBODY: Final = 65534


def _capabilities() -> int:
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    return mask(str(line).split())


def _confined(gateway: KernelGateway) -> KernelGateway:
    confinement = f"import sys; sys.path.append({str(REPOSITORY / 'tests')!r}); from lab.confined import confine; confine({_capabilities()})"
    gateway.vpnd_program = (sys.executable, "-c", f"{confinement}; from vpnd.cli.daemon import main; sys.exit(main())")
    gateway.settings = {"control_owner": str(NOBODY)}
    return gateway


def confined_xfrm(namespace: Namespace, config: Path) -> KernelGateway:
    return _confined(XfrmGateway(namespace, config))


def confined_pfkey(namespace: Namespace, config: Path) -> KernelGateway:
    return _confined(PfKeyGateway(namespace, config))


ROUTED: Final = {"if_id_in": "42", "if_id_out": "42", "xfrm_interface": "ipsec0"}


@pytest.mark.parametrize(
    ("confined", "peer", "tunnel"),
    [
        pytest.param(confined_xfrm, xfrm, Tunnel(connection_options={"encap": "yes"}, options_a=ROUTED), id="xfrm"),
        pytest.param(confined_pfkey, pfkey, Tunnel(esp_proposals="aes128-sha1", start_a="trap", connection_options={"encap": "no"}), id="pfkey"),
    ],
)
def test_the_unit_leaves_what_is_needed_and_no_more(confined: DaemonFactory, peer: DaemonFactory, tunnel: Tunnel) -> None:
    with kernel_pair(confined, peer, tunnel) as both:
        a = both.link.a
        assert isinstance(a, KernelGateway)
        assert a.vpnd is not None
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{a.vpnd.pid}/status").read_text().splitlines())
        for kind in ("CapBnd", "CapPrm", "CapEff"):
            assert int(status[kind], 16) == _capabilities(), kind
        assert a.vici_path.stat().st_uid == NOBODY
        a.initiate()
        both.carries()
        a.rekey(child="net")
        a.stop()
        assert a.traces() == []
