"""What Linux's own IPsec can do, as far as it is known without asking, and what the channels to it share."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import Action, Capabilities, Direction, IPAddress, KernelError, Policy, Unresolved
from kernel_shim.pfkey.af_key import AF_KEY as AF_KEY

ACQUIRE_SECONDS: Final = 165  # how long a larval SA stands: as long as a negotiation may take with the default retransmissions
STATISTICS: Final = Path("/proc/thread-self/net/xfrm_stat")
MAX_REPLAY_WINDOW: Final = 4096  # XFRMA_REPLAY_ESN_MAX

_AES_BITS: Final = (128, 192, 256)
_AES_AEADS: Final = (
    *(EncryptionId.AES_GCM_8, EncryptionId.AES_GCM_12, EncryptionId.AES_GCM_16),
    *(EncryptionId.AES_CCM_8, EncryptionId.AES_CCM_12, EncryptionId.AES_CCM_16),
)
_CIPHERS: Final = (EncryptionId.AES_CBC, EncryptionId.AES_CTR)
_INTEGRITY: Final = (IntegrityId.HMAC_SHA1_96, IntegrityId.HMAC_SHA2_256_128, IntegrityId.HMAC_SHA2_384_192, IntegrityId.HMAC_SHA2_512_256)

XFRM: Final = Capabilities(
    name="xfrm",
    algorithms=frozenset(
        {
            *(EspAlgorithm(aead, bits) for aead in _AES_AEADS for bits in _AES_BITS),
            EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256),
            *(EspAlgorithm(cipher, bits, hmac) for cipher in _CIPHERS for bits in _AES_BITS for hmac in _INTEGRITY),
        }
    ),
    maximum_replay_window=MAX_REPLAY_WINDOW,
    port_ranges=False,  # ports are under a mask
    address_ranges=False,
    tfc_padding=True,
    if_ids=True,
    marks=True,
    offload=True,
    labels=True,  # where the module mpls_router is loaded
    labels_in_full=False,
    sa_selectors=False,  # an SA can have one pair; of more the policies decide alone
    unresolved_modes=frozenset({Unresolved.QUEUE}),  # its hold queue, where it can be switched on; else DROP
)


class HoldQueue:
    """The kernel's own queue of packets without an SA (net.core.xfrm_larval_drop), switched on for as long as a key manager is there."""

    def __init__(self, settings_file: Path | None = None) -> None:
        self.sysctls: Final = Sysctls(settings_file)
        self._on = False

    def look(self) -> None:
        self._on = self.sysctls.get("core/xfrm_larval_drop") == "0"

    def switch_on(self, acquire_seconds: int) -> None:
        """A larval SA, and the queue with it, stands for `acquire_seconds`."""
        self._on = self.sysctls.set("core/xfrm_larval_drop", "0")
        self.sysctls.set("core/xfrm_acq_expires", str(acquire_seconds))

    def restore(self) -> None:
        self.sysctls.restore()

    @property
    def mode(self) -> Unresolved:
        return Unresolved.QUEUE if self._on else Unresolved.DROP

    def mode_of(self, policy: Policy) -> Unresolved:
        """Of a policy that stands in the kernel, which does not say."""
        return self.mode if _resolves(policy) else policy.unresolved

    def require(self, policy: Policy) -> None:
        """KernelError(EOPNOTSUPP) when it asks for another mode than the kernel's."""
        if _resolves(policy) and policy.unresolved is not self.mode:
            why = "" if self._on else "; net.core.xfrm_larval_drop is 1 and cannot be changed"
            raise KernelError(errno.EOPNOTSUPP, f"unresolved: this kernel does not know '{policy.unresolved.value}'{why}")


def _resolves(policy: Policy) -> bool:
    return policy.direction is Direction.OUT and policy.action is Action.PROTECT


def is_local(address: IPAddress) -> bool:
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
        return True


def xfrm_statistics() -> Mapping[str, int]:
    """/proc/net/xfrm_stat, where the kernel has it."""
    try:
        lines = STATISTICS.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
