"""Keys and AUTH after IKE_INTERMEDIATE, reckoned a second time from what the specifications say and what was on the wire.

Both of our sides would make the same mistake alike, so nothing of `vpnd.ike.keymat` and `vpnd.ike.intermediate` is used here.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

import pytest
from lab.ike_pair import KEY, Datagram, Pair, agree, child, connection, mirrored, psk

from kernel_shim.secret import Secret
from vpnd.config.model import Fragmentation
from vpnd.ike.crypto import Entropy
from vpnd.ike.crypto.groups import group
from vpnd.ike.crypto.sk import open_chain
from vpnd.ike.exchanges import ike_intermediate
from vpnd.ike.iana import Exchange
from vpnd.ike.wire.header import decode_header
from vpnd.ike.wire.message import decode_message, decode_payloads
from vpnd.ike.wire.payloads import AuthPayload, IdiPayload, IdrPayload, SkPayload

SK = 46  # the type of an encrypted payload
PRF_LENGTH = 32  # HMAC-SHA-256
ENCRYPTION_LENGTH = 16 + 4  # AES-128-GCM: key and salt


def prf(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)


def prf_plus(key: bytes, seed: bytes, length: int) -> bytes:
    """RFC 7296 section 2.13."""
    made, last, count = b"", b"", 1
    while len(made) < length:
        last = prf(key, last + seed + bytes((count,)))
        made, count = made + last, count + 1
    return made[:length]


@dataclass
class Watcher:
    """Knows the keys as they change, and what every message says."""

    pair: Pair
    secrets: list[bytes] = field(default_factory=list)
    of_initiator: bytes = b""
    of_responder: bytes = b""
    rounds: int = 0
    auths: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # by sender: AUTH and the body of the identity

    def group(self, number: int) -> Watcher._Method:
        return Watcher._Method(self, number)

    @dataclass
    class _Method:
        watcher: Watcher
        number: int

        def initiate(self, entropy: Entropy) -> object:
            return group(self.number).initiate(entropy)

        def respond(self, public: bytes, entropy: Entropy) -> tuple[bytes, Secret]:
            answer, secret = group(self.number).respond(public, entropy)
            self.watcher.secrets.append(secret.reveal())
            return answer, secret

    def look(self, datagram: Datagram) -> bool:
        exchange = decode_header(datagram.data).exchange
        if exchange in (Exchange.IKE_INTERMEDIATE, Exchange.IKE_AUTH):
            self._open(datagram, exchange)
        return False

    def _open(self, datagram: Datagram, exchange: int) -> None:
        # the initiator's keys are still those that this message is protected by
        keys, suite = self.pair.a.sa.keys.keys, self.pair.a.sa.keys.suite
        initiators, responders = keys.ciphers(suite, True)
        sealed = decode_message(datagram.data).encrypted
        assert isinstance(sealed, SkPayload)
        chain = open_chain(datagram.data, sealed, initiators if datagram.sender == "a" else responders)
        if exchange == Exchange.IKE_AUTH:
            payloads = decode_payloads(sealed.first, chain)
            auth = next(each for each in payloads if isinstance(each, AuthPayload))
            identity = next(each for each in payloads if isinstance(each, IdiPayload | IdrPayload)).identity
            self.auths[datagram.sender] = auth.data, identity.body()
            return
        # RFC 9242 section 3.3.2: header and SK's own header with lengths as without IV, padding and ICV, and the plaintext
        head = datagram.data[:24] + (28 + 4 + len(chain)).to_bytes(4, "big")
        plain = head + bytes((sealed.first, 0)) + (4 + len(chain)).to_bytes(2, "big") + chain
        assert head[16] == SK
        if datagram.sender == "a":
            self.of_initiator = prf(keys.pi.reveal(), self.of_initiator + plain)
        else:
            self.of_responder = prf(keys.pr.reveal(), self.of_responder + plain)
            self.rounds += 1


@pytest.mark.parametrize("methods", ["ke1_ecp256", "ke1_mlkem768-ke2_x448", "ke1_ecp256-ke2_mlkem1024-ke3_ecp384"])
def test_keys_and_auth_are_those_of_the_specifications(methods: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ike = f"aes128gcm16-prfsha256-x25519-{methods}"
    a = connection("to-b", psk("a.example"), psk("b.example"), [child()], ike, mobike=False, fragmentation=Fragmentation.NO)
    b = connection("to-a", psk("b.example"), psk("a.example"), [mirrored(child())], ike, mobike=False, fragmentation=Fragmentation.NO)
    pair = Pair(a, b)
    watcher = Watcher(pair)
    monkeypatch.setattr(ike_intermediate, "group", watcher.group)
    pair.a.start(pair.b.endpoint, pair.now, *a.children.values())
    first = pair.flight[0].data
    pair.step()
    answer = pair.flight[0].data
    pair.step()
    begun = pair.a.sa.keys.keys
    pair.settle(watcher.look)
    agree(pair, 1)
    nonce_i, nonce_r = pair.a.sa.nonce_i, pair.a.sa.nonce_r
    spis = first[:8] + answer[8:16]

    # RFC 9370 section 2.2.2: SKEYSEED(n) = prf(SK_d(n-1), SK(n) | Ni | Nr), and all keys anew from it
    d = begun.d.reveal()
    assert len(watcher.secrets) == watcher.rounds == methods.count("-") + 1
    for secret in watcher.secrets:
        seed = prf(d, secret + nonce_i + nonce_r)
        # SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr, and an AEAD has no SK_a
        made = prf_plus(seed, nonce_i + nonce_r + spis, 3 * PRF_LENGTH + 2 * ENCRYPTION_LENGTH)
        d = made[:PRF_LENGTH]
    pi, pr = made[-2 * PRF_LENGTH : -PRF_LENGTH], made[-PRF_LENGTH:]
    found = pair.a.sa.keys.keys
    assert (found.d.reveal(), found.pi.reveal(), found.pr.reveal()) == (d, pi, pr)

    # RFC 7296 section 2.15 and RFC 9242 section 3.3.2: RealMessage | Nonce | prf(SK_p, ID) | IntAuth_i | IntAuth_r | message id of IKE_AUTH
    covered = watcher.of_initiator + watcher.of_responder + (1 + watcher.rounds).to_bytes(4, "big")
    padded = prf(KEY, b"Key Pad for IKEv2")
    for sender, message, nonce, key in (("a", first, nonce_r, pi), ("b", answer, nonce_i, pr)):
        auth, identity = watcher.auths[sender]
        assert auth == prf(padded, message + nonce + prf(key, identity) + covered)
