"""What Linux's own IPsec can do, as far as it is known without asking."""

from __future__ import annotations

from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import Capabilities, Unresolved

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
    if_ids=True,
    marks=True,
    offload=True,
    sa_selectors=False,  # an SA can have one pair; of more the policies decide alone
    unresolved_modes=frozenset({Unresolved.QUEUE}),  # its hold queue, where it can be switched on; else DROP
)
