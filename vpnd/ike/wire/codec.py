"""Every payload's decoder and encoder side by side, and the registry of them that `message` works from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from vpnd.ike import iana
from vpnd.ike.iana import EapCode, IdType
from vpnd.ike.identity import Identity
from vpnd.ike.wire.payloads import (
    AuthPayload,
    CertPayload,
    CertReqPayload,
    ConfigValue,
    CpPayload,
    DeletePayload,
    EapPayload,
    IdiPayload,
    IdrPayload,
    KePayload,
    NoncePayload,
    NotifyPayload,
    Payload,
    SaPayload,
    TsiPayload,
    TsrPayload,
    VendorIdPayload,
)
from vpnd.ike.wire.proposals import decode_sa, encode_sa
from vpnd.ike.wire.reader import Reader, Writer
from vpnd.ike.wire.selectors import decode_ts, encode_ts

# Of the specification.
MIN_NONCE: Final = 16  # octets, RFC 7296 section 3.9
MAX_NONCE: Final = 256

# Of this implementation.
MAX_DELETED_SPIS: Final = 1024  # of one payload; more SAs than that are deleted in several
MAX_CONFIG_ATTRIBUTES: Final = 256  # of one payload


def _decode_ke(reader: Reader) -> KePayload:
    group = reader.u16()
    reader.skip(2)
    return KePayload(group, reader.rest())


def _encode_ke(payload: KePayload, writer: Writer) -> None:
    writer.u16(payload.group)
    writer.u16(0)
    writer.put(payload.data)


_ADDRESS_LENGTH: Final[dict[int, int]] = {IdType.IPV4_ADDR: 4, IdType.IPV6_ADDR: 16}


def _decode_identity(reader: Reader) -> Identity:
    identity_type = reader.u8()
    reader.skip(3)
    if identity_type == IdType.ANY:
        raise reader.fail("identity of type 0")
    data = reader.rest()
    if len(data) != _ADDRESS_LENGTH.get(identity_type, len(data)):
        raise reader.fail(f"address of {len(data)} octets")
    return Identity(identity_type, data)


def _encode_identity(payload: IdiPayload | IdrPayload, writer: Writer) -> None:
    writer.put(payload.identity.body())


def _decode_cert(reader: Reader) -> CertPayload:
    return CertPayload(reader.u8(), reader.rest())


def _decode_certreq(reader: Reader) -> CertReqPayload:
    return CertReqPayload(reader.u8(), reader.rest())


def _encode_cert(payload: CertPayload | CertReqPayload, writer: Writer) -> None:
    writer.u8(payload.encoding)
    writer.put(payload.data)


def _decode_auth(reader: Reader) -> AuthPayload:
    method = reader.u8()
    reader.skip(3)
    return AuthPayload(method, reader.rest())


def _encode_auth(payload: AuthPayload, writer: Writer) -> None:
    writer.put(bytes((payload.method, 0, 0, 0)))
    writer.put(payload.data)


def _decode_nonce(reader: Reader) -> NoncePayload:
    if not MIN_NONCE <= reader.remaining <= MAX_NONCE:
        raise reader.fail(f"{reader.remaining} octets, {MIN_NONCE} to {MAX_NONCE} are allowed")
    return NoncePayload(reader.rest())


def _encode_data(payload: NoncePayload | VendorIdPayload, writer: Writer) -> None:
    writer.put(payload.data)


def _decode_notify(reader: Reader) -> NotifyPayload:
    protocol, spi_size, notify_type = reader.u8(), reader.u8(), reader.u16()
    spi = reader.take(spi_size)
    return NotifyPayload(notify_type, reader.rest(), protocol, spi)


def _encode_notify(payload: NotifyPayload, writer: Writer) -> None:
    writer.put(bytes((payload.protocol, len(payload.spi))))
    writer.u16(payload.type)
    writer.put(payload.spi)
    writer.put(payload.data)


def _decode_delete(reader: Reader) -> DeletePayload:
    protocol, spi_size, count = reader.u8(), reader.u8(), reader.u16()
    if count > MAX_DELETED_SPIS:
        raise reader.fail(f"{count} SPIs, at most {MAX_DELETED_SPIS} are allowed")
    if count and not spi_size:
        raise reader.fail(f"{count} SPIs of no octets")
    return DeletePayload(protocol, tuple(reader.take(spi_size) for _ in range(count)))


def _encode_delete(payload: DeletePayload, writer: Writer) -> None:
    size = len(payload.spis[0]) if payload.spis else 0
    writer.put(bytes((payload.protocol, size)))
    writer.u16(len(payload.spis))
    writer.put(b"".join(payload.spis))


def _decode_vendor_id(reader: Reader) -> VendorIdPayload:
    return VendorIdPayload(reader.rest())


def _decode_cp(reader: Reader) -> CpPayload:
    config_type = reader.u8()
    reader.skip(3)
    attributes: list[ConfigValue] = []
    while reader.remaining:
        if len(attributes) == MAX_CONFIG_ATTRIBUTES:
            raise reader.fail(f"more than {MAX_CONFIG_ATTRIBUTES} attributes")
        attribute = reader.u16() & 0x7FFF
        attributes.append(ConfigValue(attribute, reader.take(reader.u16())))
    return CpPayload(config_type, tuple(attributes))


def _encode_cp(payload: CpPayload, writer: Writer) -> None:
    writer.put(bytes((payload.type, 0, 0, 0)))
    for attribute in payload.attributes:
        writer.u16(attribute.type)
        writer.u16(len(attribute.value))
        writer.put(attribute.value)


def _decode_eap(reader: Reader) -> EapPayload:
    # RFC 3748 section 4: the length counts from the code.
    code, identifier, length = reader.u8(), reader.u8(), reader.u16()
    if length != reader.remaining + 4:
        raise reader.fail(f"length {length}, {reader.remaining + 4} octets present")
    if code in (EapCode.REQUEST, EapCode.RESPONSE) and not reader.remaining:
        raise reader.fail("no EAP type")
    if code in (EapCode.SUCCESS, EapCode.FAILURE) and reader.remaining:
        raise reader.fail("data in a message that has none")
    return EapPayload(code, identifier, reader.rest())


def _encode_eap(payload: EapPayload, writer: Writer) -> None:
    writer.put(bytes((payload.code, payload.identifier)))
    writer.u16(4 + len(payload.data))
    writer.put(payload.data)


@dataclass(frozen=True, slots=True)
class PayloadCodec:
    """How one payload looks after its generic header. `decode` reads all that its reader holds, and raises only MalformedMessage."""

    payload_type: int
    kind: type[Any]
    decode: Callable[[Reader], Payload]
    encode: Callable[[Any, Writer], None]

    @property
    def name(self) -> str:
        return iana.name_of(iana.Payload, self.payload_type)


CODECS: Final = (
    PayloadCodec(iana.Payload.SA, SaPayload, decode_sa, encode_sa),
    PayloadCodec(iana.Payload.KE, KePayload, _decode_ke, _encode_ke),
    PayloadCodec(iana.Payload.IDI, IdiPayload, lambda reader: IdiPayload(_decode_identity(reader)), _encode_identity),
    PayloadCodec(iana.Payload.IDR, IdrPayload, lambda reader: IdrPayload(_decode_identity(reader)), _encode_identity),
    PayloadCodec(iana.Payload.CERT, CertPayload, _decode_cert, _encode_cert),
    PayloadCodec(iana.Payload.CERTREQ, CertReqPayload, _decode_certreq, _encode_cert),
    PayloadCodec(iana.Payload.AUTH, AuthPayload, _decode_auth, _encode_auth),
    PayloadCodec(iana.Payload.NONCE, NoncePayload, _decode_nonce, _encode_data),
    PayloadCodec(iana.Payload.NOTIFY, NotifyPayload, _decode_notify, _encode_notify),
    PayloadCodec(iana.Payload.DELETE, DeletePayload, _decode_delete, _encode_delete),
    PayloadCodec(iana.Payload.VENDOR_ID, VendorIdPayload, _decode_vendor_id, _encode_data),
    PayloadCodec(iana.Payload.TSI, TsiPayload, lambda reader: decode_ts(reader, TsiPayload), encode_ts),
    PayloadCodec(iana.Payload.TSR, TsrPayload, lambda reader: decode_ts(reader, TsrPayload), encode_ts),
    PayloadCodec(iana.Payload.CP, CpPayload, _decode_cp, _encode_cp),
    PayloadCodec(iana.Payload.EAP, EapPayload, _decode_eap, _encode_eap),
)
BY_TYPE: Final = {codec.payload_type: codec for codec in CODECS}
BY_KIND: Final = {codec.kind: codec for codec in CODECS}
