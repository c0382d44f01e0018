"""Security associations from messages: what the kernel tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kernel_shim.algorithms import AEAD_ICV, INTEGRITY_ICV, EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import (
    NO_LIFETIME,
    AcquireSequence,
    Direction,
    HeaderCopies,
    IPAddress,
    Lifetime,
    Mark,
    Mode,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    TrafficSelector,
    UdpEncapsulation,
)
from kernel_shim.secret import NO_SECRET, Secret
from kernel_shim.xfrm.constants import AEAD_NAMES, CIPHER_NAMES, INFINITE, INTEGRITY_NAMES, UDP_ENCAP_ESPINUDP, Attribute, ExtraFlag, SaDirection, StateFlag
from kernel_shim.xfrm.modes import mode_from
from kernel_shim.xfrm.ownership import reqid_from
from kernel_shim.xfrm.replay import NO_REPLAY_STATE, ReplayState, Usage, replay_from
from kernel_shim.xfrm.sas import Larval
from kernel_shim.xfrm.selectors import if_id_from, mark_from, selector_from, set_mark_from
from kernel_shim.xfrm.structs import (
    ALGORITHM,
    ALGORITHM_SIZED,
    ENCAPSULATION,
    NUMBER,
    OCTET,
    OFFLOAD,
    MalformedMessage,
    SaStruct,
    SelectorStruct,
    unpack,
    unpack_address,
)


@dataclass(frozen=True, slots=True)
class KernelSa:
    """What the kernel told of an SA. `direction` None: it did not say; `algorithm` None: the SA is larval."""

    id: SaId
    source: IPAddress
    mode: Mode
    reqid: int  # the kernel's own
    direction: Direction | None
    algorithm: EspAlgorithm | None
    encryption_key: Secret
    integrity_key: Secret
    encapsulation: UdpEncapsulation | None
    selector: Selector | None
    esn: bool
    replay_window: int
    soft: Lifetime
    hard: Lifetime
    usage: Usage
    replay: ReplayState
    acquire: AcquireSequence  # of a larval SA that an ACQUIRE left
    mark: Mark
    set_mark: Mark
    if_id: int
    device: int  # that encrypts; 0 is none
    flags: int  # `XFRM_STATE_*`
    extra_flags: int  # `XFRM_SA_XFLAG_*`
    tfc_padding: int = 0

    @property
    def copies(self) -> HeaderCopies:
        return HeaderCopies(
            dscp_out=not self.extra_flags & ExtraFlag.DONT_ENCAP_DSCP,
            dscp_in=bool(self.flags & StateFlag.DECAP_DSCP),
            ecn=not self.flags & StateFlag.NO_ECN,
            df=not self.flags & StateFlag.NO_PMTU_DISCOVERY,
        )

    @property
    def larval(self) -> Larval | None:
        """None for an SA that stands, or whose SPI was reserved."""
        if self.algorithm is not None or self.id.spi or not self.acquire:
            return None
        return Larval(self.acquire, self.source, self.id.destination, self.mode, reqid_from(self.reqid), self.mark, self.if_id)

    def status(self, direction: Direction, device: str = "") -> SaStatus:
        """In the words of the model; a larval SA, which has no algorithm yet, shows the null cipher. `device` is the name of `self.device`."""
        selector = self.selector
        sources: tuple[TrafficSelector, ...] = ()
        destinations: tuple[TrafficSelector, ...] = ()
        if selector is not None:
            sources = (TrafficSelector(selector.source, selector.protocol, selector.source_ports),)
            destinations = (TrafficSelector(selector.destination, selector.protocol, selector.destination_ports),)
        sa = SecurityAssociation(
            spi=self.id.spi,
            source=self.source,
            destination=self.id.destination,
            direction=direction,
            mode=self.mode,
            reqid=reqid_from(self.reqid),
            algorithm=self.algorithm or EspAlgorithm(EncryptionId.NULL, 0),
            encryption_key=self.encryption_key,
            integrity_key=self.integrity_key,
            encapsulation=self.encapsulation,
            replay_window=self.replay_window,
            esn=self.esn,
            soft=self.soft,
            hard=self.hard,
            source_selectors=sources,
            destination_selectors=destinations,
            acquire=self.acquire,
            if_id=self.if_id,
            mark=self.mark,
            set_mark=self.set_mark,
            copies=self.copies,
            tfc_padding=self.tfc_padding,
            offload=device,
        )
        state = SaState.MATURE if self.algorithm else SaState.LARVAL
        sequence = self.replay.sent if direction is Direction.OUT else self.replay.received
        used = self.usage
        return SaStatus(sa, state, used.octets, used.packets, float(used.added), float(used.used) or None, sequence)


def reqid_of(body: bytes) -> int:
    """The kernel's reqid in a usersa_info."""
    return SaStruct.unpack(body).reqid


def sa_from(body: bytes, attributes: Mapping[int, bytes]) -> KernelSa:
    """From a usersa_info and its attributes. MalformedMessage also for an algorithm, mode or selector that we have no word for."""
    info = SaStruct.unpack(body)
    algorithm, encryption_key, integrity_key = _algorithm_from(attributes)
    encapsulation = None
    if (data := attributes.get(Attribute.ENCAP)) is not None:
        kind, source, destination, _ = unpack(ENCAPSULATION, data, "encap_tmpl")
        if kind == UDP_ENCAP_ESPINUDP:
            encapsulation = UdpEncapsulation(int.from_bytes(source, "big"), int.from_bytes(destination, "big"))
    replay = replay_from(attributes)
    device = 0
    if (data := attributes.get(Attribute.OFFLOAD_DEV)) is not None:
        device, _ = unpack(OFFLOAD, data, "user_offload")
    extra = 0
    if (data := attributes.get(Attribute.SA_EXTRA_FLAGS)) is not None:
        (extra,) = unpack(NUMBER, data, "extra flags")
    padding = 0
    if (data := attributes.get(Attribute.TFCPAD)) is not None:
        (padding,) = unpack(NUMBER, data, "TFC padding")
    return KernelSa(
        tfc_padding=padding,
        id=SaId(unpack_address(info.daddr, info.family), Spi(info.spi), info.proto),
        source=unpack_address(info.saddr, info.family),
        mode=mode_from(info.mode),
        reqid=info.reqid,
        direction=_direction_from(attributes),
        algorithm=algorithm,
        encryption_key=encryption_key,
        integrity_key=integrity_key,
        encapsulation=encapsulation,
        selector=_selector_from(info.selector, attributes),
        esn=bool(info.flags & StateFlag.ESN),
        replay_window=replay.window if replay is not None and replay.wide else info.replay_window,
        soft=_lifetime_from(info.lifetime.soft_seconds, info.lifetime.soft_octets, info.lifetime.soft_packets),
        hard=_lifetime_from(info.lifetime.hard_seconds, info.lifetime.hard_octets, info.lifetime.hard_packets),
        usage=Usage(info.octets, info.packets, info.add_time, info.use_time),
        replay=replay or NO_REPLAY_STATE,
        acquire=AcquireSequence(info.seq),
        mark=mark_from(attributes),
        set_mark=set_mark_from(attributes),
        if_id=if_id_from(attributes),
        device=device,
        flags=info.flags,
        extra_flags=extra,
    )


def _direction_from(attributes: Mapping[int, bytes]) -> Direction | None:
    data = attributes.get(Attribute.SA_DIR)
    if data is None:
        return None
    (number,) = unpack(OCTET, data, "SA direction")
    return {SaDirection.IN: Direction.IN, SaDirection.OUT: Direction.OUT}.get(number)


def _selector_from(struct: SelectorStruct, attributes: Mapping[int, bytes]) -> Selector | None:
    """None where the selector takes every packet, or is one that no policy of ours could have."""
    if not struct.family or not (struct.prefixlen_s or struct.prefixlen_d or struct.proto):
        return None
    # a larval SA's names the device of the packet that asked
    struct = struct._replace(ifindex=0, user=0)
    return selector_from(struct, {kind: attributes[kind] for kind in (Attribute.MARK, Attribute.IF_ID) if kind in attributes})


def _lifetime_from(seconds: int, octets: int, packets: int) -> Lifetime:
    lifetime = Lifetime(seconds, 0 if octets == INFINITE else octets, 0 if packets == INFINITE else packets)
    return NO_LIFETIME if lifetime == NO_LIFETIME else lifetime


def _algorithm_from(attributes: Mapping[int, bytes]) -> tuple[EspAlgorithm | None, Secret, Secret]:
    if (data := attributes.get(Attribute.ALG_AEAD)) is not None:
        name, key, icv = _sized(data)
        for encryption, known in AEAD_NAMES.items():
            if known == name and AEAD_ICV[encryption] == icv:
                return _algorithm(encryption, key, IntegrityId.NONE), Secret(key), NO_SECRET
        raise MalformedMessage(f"an AEAD named {name} with {icv} octets of ICV")
    if (data := attributes.get(Attribute.ALG_CRYPT)) is None:
        return None, NO_SECRET, NO_SECRET
    name, key = _plain(data)
    cipher = next((encryption for encryption, known in CIPHER_NAMES.items() if known == name), None)
    if cipher is None:
        raise MalformedMessage(f"a cipher named {name}")
    integrity, own = IntegrityId.NONE, b""
    if (data := attributes.get(Attribute.ALG_AUTH_TRUNC)) is not None:
        name, own, icv = _sized(data)
        integrity = next((i for i, known in INTEGRITY_NAMES.items() if known == name and INTEGRITY_ICV[i] == icv), IntegrityId.NONE)
        if integrity is IntegrityId.NONE:
            raise MalformedMessage(f"an integrity algorithm named {name} with {icv} octets of ICV")
    return _algorithm(cipher, key, integrity), Secret(key), Secret(own)


def _algorithm(encryption: EncryptionId, key: bytes, integrity: IntegrityId) -> EspAlgorithm:
    bits = 8 * (len(key) - EspAlgorithm(encryption, 0).encryption_key_length)  # less the salt
    if bits < 0:
        raise MalformedMessage(f"a key of {len(key)} octets for {encryption.name}")
    return EspAlgorithm(encryption, bits, integrity)


def _plain(data: bytes) -> tuple[str, bytes]:
    name, bits = unpack(ALGORITHM, data, "xfrm_algo")
    return _name(name), _key(data, ALGORITHM.size, bits)


def _sized(data: bytes) -> tuple[str, bytes, int]:
    """Name, key, and octets of ICV."""
    name, bits, icv = unpack(ALGORITHM_SIZED, data, "xfrm_algo_aead")
    return _name(name), _key(data, ALGORITHM_SIZED.size, bits), icv // 8


def _name(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "replace")


def _key(data: bytes, at: int, bits: int) -> bytes:
    key = data[at : at + bits // 8]
    if bits % 8 or len(key) != bits // 8:
        raise MalformedMessage(f"a key of {bits} bits in {len(data) - at} octets")
    return key
