"""A peer that is authenticated and means no good: it says anything, in any order, under the right keys. We stay whole, bounded, and lose nothing.

`Malice` has no state of its own: it knows the keys of each IKE SA of ours, what we wait for and what we would take next.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.ike_pair import Pair, Peer, child, connection, mirrored, psk

from kernel_shim.model import SaId
from vpnd.ike.crypto.groups import group
from vpnd.ike.exchanges.mobike import MAX_ADDITIONAL
from vpnd.ike.followup import MAX_FOLLOWUPS
from vpnd.ike.fragments import Outgoing, seal
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import number_proposals
from vpnd.ike.sa import IkeSa
from vpnd.ike.session import MAX_EARLY_DELETES
from vpnd.ike.state import MAX_TASKS
from vpnd.ike.wire.header import Header, MessageId
from vpnd.ike.wire.payloads import (
    AuthPayload,
    CertReqPayload,
    DeletePayload,
    IdrPayload,
    KePayload,
    NoncePayload,
    NotifyPayload,
    Payload,
    SaPayload,
    TsiPayload,
    TsrPayload,
    UnknownPayload,
)

pytestmark = pytest.mark.property

STEPS = 40
ADDITIONAL = "-ke1_ecp256"
MAX_IKE_SAS = 8  # of one peer after STEPS; each rekeying that is answered makes one, and the one before must be gone first
EXCHANGES = (Exchange.IKE_AUTH, Exchange.IKE_INTERMEDIATE, Exchange.IKE_SA_INIT, 99)  # those that an IKE SA that stands has no use for


class Malice:
    def __init__(self, pair: Pair, victim: Peer, rng: random.Random) -> None:
        self.pair, self.victim, self.rng = pair, victim, rng
        self.entropy = rng.randbytes
        self.sent: list[bytes] = []
        self.ike = number_proposals(victim.connections[0].proposals)
        self.esp = [config.esp_proposals for config in victim.connections[0].children.values()]
        self.publics = {number: group(number).initiate(self.entropy).public for number in (31, 19)}
        self.kinds = (self._notify, self._notify, self._sa, self._key, self._nonce, self._delete, self._selectors, self._other)

    def act(self) -> None:
        """One datagram: new, the one before with something wrong, or one of earlier."""
        chance = self.rng.random()
        if self.sent and chance < 0.15:
            self._arrive(self.rng.choice(self.sent))
        elif self.sent and chance < 0.25:
            damaged = bytearray(self.rng.choice(self.sent))
            damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
            self._arrive(bytes(damaged))
        else:
            standing = self.victim.standing
            if standing:
                pieces = list(self._message(self.rng.choice(standing)).datagrams)
                if self.rng.random() < 0.3:
                    self.rng.shuffle(pieces)
                    del pieces[self.rng.randrange(len(pieces)) :]
                for data in pieces:
                    self.sent.append(data)
                    self._arrive(data)

    def _arrive(self, data: bytes) -> None:
        sas = [sa for sa in self.victim.sas.values() if sa.wire_spi_i == data[:8]]
        for sa in sas[:1]:
            remote = self.rng.choice((sa.remote, sa.remote, self.pair.a.endpoint, self.pair.b.endpoint))
            self.victim.run(sa, sa.receive(data, sa.local, remote, self.pair.now), self.pair.now)

    def _message(self, sa: IkeSa) -> Outgoing:
        assert sa.crypto is not None
        initiator = not sa.initiator
        cipher, _ = sa.crypto.keys.ciphers(sa.crypto.suite, initiator)
        waiting, response = sa._outstanding, self.rng.random() < 0.5
        exchange, payloads = self._content(sa)
        if response and waiting is not None:
            number, exchange = waiting.message_id, waiting.exchange if self.rng.random() < 0.9 else exchange
        else:
            number, response = sa._inbox.expected, response and self.rng.random() < 0.1
        number += self.rng.choice((0,) * 10 + (1, -1))
        header = Header(sa.wire_spi_i, sa.wire_spi_r, exchange, MessageId(number % 2**32), initiator=initiator, response=response)
        limit = self.rng.choice((0, 0, 0, 200, 500))
        return seal(header, payloads, cipher, self.entropy, limit)

    def _content(self, sa: IkeSa) -> tuple[int, list[Payload]]:
        """Often what could be meant, with one payload less now and then; or anything."""
        chance = self.rng.random()
        some: list[Payload] = [self.rng.choice(self.kinds)(sa) for _ in range(self.rng.randrange(1, 5))]
        if chance < 0.5:
            spi, config = self.entropy(4) if self.rng.random() < 0.9 else self._spi(sa), self.rng.randrange(len(self.esp))
            rekeyed: list[Payload] = [self._rekey(sa)] if self.rng.random() < 0.5 else []
            made = [*rekeyed, SaPayload(number_proposals(self.esp[config], spi)), self._nonce(sa), self._key(sa), *self._both_selectors(config)]
        elif chance < 0.65:
            made = [SaPayload(tuple(each.with_spi(self.entropy(8)) for each in self.ike)), self._nonce(sa), self._key(sa)]
        elif chance < 0.75:
            return Exchange.IKE_FOLLOWUP_KE, [KePayload(19, self.publics[19]) if self.rng.random() < 0.8 else self._key(sa), self._link(sa)]
        elif chance < 0.9:
            return Exchange.INFORMATIONAL, [] if chance < 0.8 else some
        else:
            return self.rng.choice(EXCHANGES), some
        if self.rng.random() < 0.2:
            del made[self.rng.randrange(len(made))]
        return Exchange.CREATE_CHILD_SA, made

    def _rekey(self, sa: IkeSa) -> NotifyPayload:
        return NotifyPayload(NotifyType.REKEY_SA, b"", ProtocolId.ESP, self._spi(sa))

    def _spi(self, sa: IkeSa) -> bytes:
        """Of a CHILD_SA, as the peer names it; often one that there is."""
        known = [entry.sa.outbound.spi for entry in sa.children.values()]
        return (self.rng.choice(known) if known and self.rng.random() < 0.8 else self.rng.choice((0, 1, 0x1000))).to_bytes(4, "big")

    def _link(self, sa: IkeSa) -> NotifyPayload:
        return NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, self.rng.choice([*sa.followups, b"", b"12345678"]))

    def _notify(self, sa: IkeSa) -> NotifyPayload:
        kind = self.rng.choice(list(NotifyType))
        data = self.rng.choice((b"", b"\x00\x1f", b"\x00\x13", self.entropy(4), self.entropy(16), self.entropy(20), self.entropy(40)))
        if kind == NotifyType.REDIRECT:
            data = self.rng.choice((b"\x01\x04\xc0\x00\x02\x09", b"\x03\x07gateway", data))
        elif kind == NotifyType.ADDITIONAL_KEY_EXCHANGE:
            return self._link(sa)
        elif kind == NotifyType.AUTHENTICATION_FAILED and self.rng.random() < 0.9:
            kind = NotifyType.UPDATE_SA_ADDRESSES
        return NotifyPayload(kind, data, self.rng.choice((0, 1, 3)), self.rng.choice((b"", self._spi(sa))))

    def _sa(self, sa: IkeSa) -> SaPayload:
        return self.rng.choice((SaPayload(()), SaPayload(number_proposals(self.esp[0], self._spi(sa))), SaPayload(self.ike)))

    def _key(self, _sa: IkeSa) -> KePayload:
        number = self.rng.choice((31, 31, 31, 31, 19, 0, 14, 35))
        public = self.publics.get(number, bytes(32))
        return KePayload(number, public if self.rng.random() < 0.9 else self.rng.choice((b"", bytes(32), public[:-1])))

    def _nonce(self, _sa: IkeSa) -> NoncePayload:
        return NoncePayload(self.entropy(self.rng.choice((32, 32, 32, 32, 32, 32, 16, 256, 8))))

    def _delete(self, sa: IkeSa) -> DeletePayload:
        if self.rng.random() < 0.05:
            return DeletePayload(ProtocolId.IKE)
        return DeletePayload(ProtocolId.ESP, tuple(self._spi(sa) for _ in range(self.rng.randrange(3))))

    def _both_selectors(self, number: int) -> tuple[Payload, Payload]:
        config = list(self.victim.connections[0].children.values())[number]
        theirs, ours = (tuple(each.addresses for each in side if each.addresses) for side in (config.remote_ts, config.local_ts))
        pair = (theirs, ours) if self.rng.random() < 0.9 else (ours, theirs)
        return TsiPayload(pair[0]), TsrPayload(pair[1])

    def _selectors(self, _sa: IkeSa) -> Payload:
        return self.rng.choice((*self._both_selectors(0), TsiPayload(()), TsrPayload(())))

    def _other(self, _sa: IkeSa) -> Payload:
        return self.rng.choice(
            (
                UnknownPayload(200, self.entropy(5), critical=self.rng.random() < 0.5),
                AuthPayload(2, self.entropy(32)),
                IdrPayload(Identity.parse("anybody.example")),
                CertReqPayload(4, self.entropy(40)),
            )
        )


def own_act(pair: Pair, victim: Peer, rng: random.Random) -> None:
    """What the victim does of its own accord meanwhile."""
    standing = [sa for sa in victim.standing if sa.established_at is not None]
    if not standing:
        return
    sa = rng.choice(standing)
    some = list(sa.children)
    match rng.randrange(7):
        case 0:
            effects = sa.create_child(rng.choice(list(sa.connection.children.values())), pair.now)
        case 1 if some:
            effects = sa.rekey_child(rng.choice(some), pair.now)
        case 2:
            effects = sa.rekey(pair.now)
        case 3 if some:
            effects = sa.delete_child(rng.choice(some), pair.now)
        case 4:
            effects = sa.addresses_changed(pair.now)
        case 5 if some:
            effects = sa.child_expired(rng.choice(some), pair.now)
        case _:
            effects = sa.probe(pair.now)
    victim.run(sa, effects, pair.now)


def bounded(victim: Peer) -> None:
    assert len(victim.standing) <= MAX_IKE_SAS
    assert victim.reassembly.held <= 65536 * 2 * len(victim.sas)
    for sa in victim.standing:
        assert len(sa.followups) <= MAX_FOLLOWUPS
        assert len(sa.early_deletes) <= MAX_EARLY_DELETES
        assert len(sa.queue) + len(sa.postponed) <= MAX_TASKS
        assert len(sa.peer_addresses) <= MAX_ADDITIONAL


def whole(victim: Peer) -> None:
    """Each SA in the kernel is a CHILD_SA's, or lingers; each that is larval is held for one."""
    owned = {sa_id for sa in victim.standing for entry in sa.children.values() for sa_id in (entry.sa.inbound.id, entry.sa.outbound.id)}
    assert set(victim.sad) - owned - set(victim.lingering) == set()
    inbound = {entry.sa.inbound.id for sa in victim.standing for entry in sa.children.values()}
    assert inbound <= set(victim.sad)
    held: set[SaId] = {sa_id for sa in victim.standing for sa_id in sa.held}
    assert victim.larval == held


def live(seed: int, additional: str) -> None:
    rng = random.Random(seed)
    configs = [
        child(f"c{number}", f"10.{number}.0.0/16", f"172.16.{number}.0/24", f"aes128gcm16{pfs}") for number, pfs in enumerate(("", f"-x25519{additional}"))
    ]
    ike = f"aes128-sha256-x25519-ecp256{additional}" if not additional else f"aes128-sha256-x25519{additional}"
    pair = Pair(
        connection("to-b", psk("a"), psk("b"), configs, ike),
        connection("to-a", psk("b"), psk("a"), [mirrored(config) for config in configs], ike),
        nat_a=rng.choice([None, "198.51.100.7"]),
    )
    pair.connect()
    victim = rng.choice(pair.peers)
    malice = Malice(pair, victim, rng)
    # a kernel takes no SA twice
    victim.refuse_install = lambda sa: sa.id in victim.sad
    for _ in range(STEPS):
        if rng.random() < 0.3:
            own_act(pair, victim, rng)
        else:
            malice.act()
        pair.flight.clear()
        if rng.random() < 0.2:
            end = pair.now + rng.choice((0.0, 1.0, 5.0, 40.0))
            while (due := min((at for sa in victim.standing if (at := sa.next_deadline()) is not None), default=end)) < end:
                pair.now = max(pair.now, due)
                for sa in victim.standing:
                    if (at := sa.next_deadline()) is not None and at <= pair.now:
                        victim.run(sa, sa.timer(pair.now), pair.now)
                pair.flight.clear()
            pair.now = end
            for sa_id in [sa_id for sa_id, at in victim.lingering.items() if at <= pair.now]:
                del victim.lingering[sa_id]
                victim.sad.pop(sa_id, None)
        bounded(victim)
        whole(victim)
    # the peer falls silent, and in the end nothing is left of it
    pair.wait(4000.0, lambda datagram: True)
    for sa in victim.standing:
        victim.run(sa, sa.delete(pair.now), pair.now)
    pair.wait(1000.0, lambda datagram: True)
    assert not victim.standing
    assert not victim.sad
    assert not victim.larval
    assert victim.reassembly.held == 0
    assert victim.up == []


@pytest.mark.parametrize("additional", ["", ADDITIONAL], ids=["one-key-exchange", "two"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_a_peer_with_the_keys_says(additional: str, seed: int) -> None:
    live(seed, additional)
