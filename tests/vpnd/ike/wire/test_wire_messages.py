"""IKE messages: octets as the RFC draws them, and scapy's parser as a second opinion."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from scapy.contrib import ikev2 as scapy_ikev2

from kernel_shim.model import AddressRange, PortRange, TrafficSelector
from vpnd.ike.iana import CertEncoding, ConfigAttribute, EapCode, Exchange, IdType, NotifyType, Payload, ProtocolId, name_of
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import Proposal, Transform, default_proposals, number_proposals
from vpnd.ike.wire.codec import MAX_CONFIG_ATTRIBUTES, MAX_DELETED_SPIS
from vpnd.ike.wire.errors import MalformedMessage
from vpnd.ike.wire.header import HEADER_LENGTH, MAX_MESSAGE, NO_SPI, Header, IkeSpi, MessageId, decode_header
from vpnd.ike.wire.message import MAX_PAYLOADS, Message, decode_message, decode_payloads, encode_message, encode_payloads
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
    SaPayload,
    SkfPayload,
    SkPayload,
    TsiPayload,
    TsrPayload,
    UnknownPayload,
    UnknownSelector,
    VendorIdPayload,
)
from vpnd.ike.wire.proposals import MAX_ATTRIBUTES, MAX_PROPOSALS

HEADER = Header(IkeSpi(b"initiato"), IkeSpi(b"responde"), Exchange.IKE_AUTH, MessageId(0x01020304), initiator=True, response=False)
IPV4 = TrafficSelector(AddressRange.of(ip_network("10.1.0.0/16")), 6, PortRange(80, 443))
IPV6 = TrafficSelector(AddressRange.of(ip_network("2001:db8::/32")))
PAYLOADS = (
    SaPayload(number_proposals(default_proposals(ProtocolId.ESP), b"\x01\x02\x03\x04")),
    KePayload(31, b"k" * 32),
    NoncePayload(b"n" * 32),
    IdiPayload(Identity.parse("moon.example.org")),
    IdrPayload(Identity.parse("C=CH, CN=sun")),
    CertPayload(CertEncoding.X509_SIGNATURE, b"certificate"),
    CertReqPayload(CertEncoding.X509_SIGNATURE, b"h" * 40),
    AuthPayload(2, b"a" * 32),
    NotifyPayload(NotifyType.COOKIE, b"cookie"),
    NotifyPayload(NotifyType.REKEY_SA, b"", ProtocolId.ESP, b"\x05\x06\x07\x08"),
    DeletePayload(ProtocolId.ESP, (b"\x01\x02\x03\x04", b"\x05\x06\x07\x08")),
    DeletePayload(ProtocolId.IKE),
    VendorIdPayload(b"vendor"),
    TsiPayload((IPV4, IPV6), (UnknownSelector(10, 0, b"label"),)),
    TsrPayload((IPV6,)),
    CpPayload(1, (ConfigValue(ConfigAttribute.INTERNAL_IP4_ADDRESS), ConfigValue(ConfigAttribute.INTERNAL_IP4_DNS, b"\x08" * 4))),
    EapPayload(EapCode.REQUEST, 7, b"\x01peer"),
    EapPayload(EapCode.SUCCESS, 8),
    UnknownPayload(54, b"puzzle"),
)


def framed(body: bytes, flags: int = 0) -> bytes:
    return bytes((0, flags)) + (len(body) + 4).to_bytes(2, "big") + body


def message(payload_type: int, body: bytes, flags: int = 0) -> bytes:
    payload = framed(body, flags)
    return b"initiato" + b"responde" + bytes((payload_type, 0x20, 34, 0x08)) + bytes(4) + (28 + len(payload)).to_bytes(4, "big") + payload


def malformed(data: bytes, field: str) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as error:
        decode_message(data)
    assert error.value.field.startswith(field), error.value
    return error.value


def test_every_payload_survives_a_round_trip():
    whole = Message(HEADER, PAYLOADS)
    data = encode_message(whole)
    assert decode_message(data) == whole
    assert encode_message(decode_message(data)) == data


@pytest.mark.parametrize("initiator", [False, True])
@pytest.mark.parametrize("response", [False, True])
@pytest.mark.parametrize("higher", [False, True])
def test_header_flags(initiator, response, higher):
    header = Header(IkeSpi(b"initiato"), NO_SPI, 34, MessageId(0), initiator, response, minor_version=3, higher_version=higher)
    data = encode_message(Message(header, ()))
    assert data[19] == 0x08 * initiator | 0x20 * response | 0x10 * higher
    assert decode_header(data) == header


def test_octets_of_an_sa_payload():
    transforms = (Transform(1, 20, 128), Transform(2, 5), Transform(4, 31, 0, ((0x8001, b"\0\1"), (2, b"abc"))))
    data = encode_payloads((SaPayload((Proposal(1, transforms), Proposal(3, (Transform(1, 12, 256),), 2, b"spi!"))),))[1]
    assert data == bytes.fromhex(
        "0000004b"  # generic header
        "0200002f 01010003"  # proposal 1: IKE, no SPI, 3 transforms
        "0300000c 01000014 800e0080"  # AES_GCM_16, key length 128
        "03000008 02000005"  # PRF_HMAC_SHA2_256
        "00000013 0400001f 80010001 00020003 616263"  # CURVE_25519 with two attributes that nobody knows
        "00000018 02030401 73706921"  # proposal 2: ESP, SPI of 4 octets, 1 transform
        "0000000c 0100000c 800e0100"  # AES_CBC, key length 256
    )


def test_octets_of_traffic_selectors():
    data = encode_payloads((TsiPayload((IPV4,)),))[1]
    assert data.hex() == "00000018" + "01000000" + "070600100050" + "01bb" + "0a010000" + "0a01ffff"


def test_scapy_reads_what_we_write():
    data = encode_message(Message(HEADER, PAYLOADS))
    packet = scapy_ikev2.IKEv2(data)
    assert (packet.init_SPI, packet.resp_SPI, packet.exch_type, packet.id, packet.length) == (b"initiato", b"responde", 35, 0x01020304, len(data))
    assert packet.flags == "Initiator"
    proposal = packet[scapy_ikev2.IKEv2_SA].prop
    assert (proposal.proposal, proposal.proto, proposal.SPI, proposal.trans_nb) == (1, 3, b"\x01\x02\x03\x04", len(PAYLOADS[0].proposals[0].transforms))
    assert (proposal.trans.transform_type, proposal.trans.transform_id, proposal.trans.key_length) == (1, 20, 256)
    assert (packet[scapy_ikev2.IKEv2_KE].group, packet[scapy_ikev2.IKEv2_KE].ke) == (31, b"k" * 32)
    assert packet[scapy_ikev2.IKEv2_Nonce].nonce == b"n" * 32
    assert (packet[scapy_ikev2.IKEv2_IDi].IDtype, packet[scapy_ikev2.IKEv2_IDi].ID) == (2, b"moon.example.org")
    assert packet[scapy_ikev2.IKEv2_CERTREQ].cert_authority == b"h" * 40
    assert (packet[scapy_ikev2.IKEv2_AUTH].auth_type, packet[scapy_ikev2.IKEv2_AUTH].load) == (2, b"a" * 32)
    assert (packet[scapy_ikev2.IKEv2_Notify].type, packet[scapy_ikev2.IKEv2_Notify].notify) == (NotifyType.COOKIE, b"cookie")
    assert packet[scapy_ikev2.IKEv2_Delete].SPI == [b"\x01\x02\x03\x04", b"\x05\x06\x07\x08"]
    selector = packet[scapy_ikev2.IKEv2_TSi].traffic_selector[0]
    assert (selector.IP_protocol_ID, selector.start_port, selector.end_port) == (6, 80, 443)
    assert (selector.starting_address_v4, selector.ending_address_v4) == ("10.1.0.0", "10.1.255.255")


def test_we_read_what_scapy_writes():
    packet = (
        scapy_ikev2.IKEv2(init_SPI=b"initiato", resp_SPI=bytes(8), exch_type="IKE_SA_INIT", flags="Initiator")
        / scapy_ikev2.IKEv2_SA(
            prop=scapy_ikev2.IKEv2_Proposal(
                trans=scapy_ikev2.IKEv2_Transform(transform_type="Encryption", transform_id=12, length=12, key_length=256)
                / scapy_ikev2.IKEv2_Transform(transform_type="PRF", transform_id=2)
                / scapy_ikev2.IKEv2_Transform(transform_type="GroupDesc", transform_id="2048MODPgr"),
                trans_nb=3,
            )
        )
        / scapy_ikev2.IKEv2_KE(group="2048MODPgr", ke=b"k" * 256)
        / scapy_ikev2.IKEv2_Nonce(nonce=b"n" * 20)
        / scapy_ikev2.IKEv2_Notify(type="NAT_DETECTION_SOURCE_IP", notify=b"h" * 20)
    )
    decoded = decode_message(bytes(packet))
    assert str(decoded.first(SaPayload).proposals[0]) == "AES_CBC-256/PRF_HMAC_SHA1/MODP_2048"
    assert decoded.first(KePayload) == KePayload(14, b"k" * 256)
    assert decoded.first(NoncePayload) == NoncePayload(b"n" * 20)
    assert decoded.notify(NotifyType.NAT_DETECTION_SOURCE_IP).data == b"h" * 20


def test_payloads_are_found_by_kind_and_notifications_by_type():
    whole = Message(HEADER, PAYLOADS)
    assert whole.first(KePayload) == PAYLOADS[1]
    assert len(whole.all(NotifyPayload)) == 2
    assert whole.notify(NotifyType.REKEY_SA).spi == b"\x05\x06\x07\x08"
    assert whole.notify(NotifyType.MOBIKE_SUPPORTED) is None
    assert whole.notifies(NotifyType.COOKIE) == (PAYLOADS[8],)
    assert whole.error is None
    assert whole.encrypted is None
    error = NotifyPayload(NotifyType.NO_PROPOSAL_CHOSEN)
    assert Message(HEADER, (*PAYLOADS, error)).error == error


def test_an_encrypted_payload_stays_closed_and_ends_the_message():
    for last in (SkPayload(Payload.IDI, b"sealed"), SkfPayload(0, 2, 3, b"sealed")):
        whole = Message(HEADER, (PAYLOADS[2], last))
        data = encode_message(whole)
        assert decode_message(data) == whole
        assert decode_message(data).encrypted == last
        malformed(data[:24] + (len(data) + 4).to_bytes(4, "big") + data[28:] + b"\0\0\0\4", "message")
    malformed(message(Payload.SKF, b"\0\3\0\2sealed"), "SKF")
    malformed(message(Payload.SKF, b"\0\0\0\2sealed"), "SKF")


def test_unknown_payloads_are_kept_or_refused_if_critical():
    assert decode_message(message(200, b"data")).payloads == (UnknownPayload(200, b"data"),)
    error = malformed(message(200, b"data", flags=0x80), "200")
    assert (error.notify, error.data) == (NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, b"\xc8")
    # RFC 7296 section 3.2: the critical bit of a payload that is known means nothing.
    assert decode_message(message(Payload.NONCE, b"n" * 16, flags=0x80)).payloads == (NoncePayload(b"n" * 16),)
    assert encode_message(Message(HEADER, (UnknownPayload(200, b"", critical=True),)))[29] == 0x80


def test_headers_that_lie():
    good = encode_message(Message(HEADER, PAYLOADS[:2]))
    malformed(b"", "header")
    malformed(good[: HEADER_LENGTH - 1], "header")
    malformed(good[:-1], "header.length")
    malformed(good + b"\0", "header.length")
    malformed(bytes(8) + good[8:], "header.initiator_spi")
    malformed(bytes(MAX_MESSAGE + 1), "header")
    assert malformed(good[:17] + b"\x30" + good[18:], "header.version").notify == NotifyType.INVALID_MAJOR_VERSION
    assert malformed(good[:17] + b"\x10" + good[18:], "header.version").notify == NotifyType.INVALID_SYNTAX


@pytest.mark.parametrize(
    ("payload_type", "body", "field"),
    [
        (Payload.SA, "00", "SA"),
        (Payload.SA, "01000008 01010000", "SA"),
        (Payload.SA, "00000008 01010000", "SA.proposal"),
        (Payload.SA, "02000010 01010001 00000008 02000005", "SA"),
        (Payload.SA, "00000010 01010001 03000008 02000005", "SA.proposal"),
        (Payload.SA, "00000010 01010001 00000007 02000005", "SA.transform"),
        (Payload.SA, "00000010 01010001 00000003 02000005", "SA.transform"),
        (Payload.SA, "00000010 01010002 00000008 02000005", "SA.proposal"),
        (Payload.SA, "00000014 01010001 00000008 02000005 00000000", "SA.proposal"),
        (Payload.SA, "00000014 01010001 0000000c 01000014 800e0000", "SA.transform"),
        (Payload.SA, "0000000a 0101ff01 0000", "SA.proposal"),
        (Payload.KE, "001f00", "KE"),
        (Payload.IDI, "010000000a0000", "IDI"),
        (Payload.IDR, "00000000", "IDR"),
        (Payload.AUTH, "0200", "AUTH"),
        (Payload.NONCE, "00" * 15, "NONCE"),
        (Payload.NONCE, "00" * 257, "NONCE"),
        (Payload.NOTIFY, "03044009", "NOTIFY"),
        (Payload.DELETE, "03040002 01020304", "DELETE"),
        (Payload.DELETE, "03040001 01020304 05", "DELETE"),
        (Payload.DELETE, "01000001", "DELETE"),
        (Payload.DELETE, f"0304{MAX_DELETED_SPIS + 1:04x}" + "00000000" * (MAX_DELETED_SPIS + 1), "DELETE"),
        (Payload.TSI, "00000000", "TSI"),
        (Payload.TSI, "02000000 07000010 0000ffff 0a000000 0a0000ff", "TSI"),
        (Payload.TSI, "01000000 07000010 0000ffff 0a0000ff 0a000000", "TS.selector"),
        (Payload.TSR, "01000000 07000010 00500010 0a000000 0a0000ff", "TS.selector"),
        (Payload.TSR, "01000000 07000014 0000ffff 0a000000 0a0000ff 00000000", "TS.selector"),
        (Payload.TSR, "01000000 07000003 0000ffff 0a000000 0a0000ff", "TS.selector"),
        (Payload.CP, "01000000 0001", "CP"),
        (Payload.CP, "01000000" + "00010000" * (MAX_CONFIG_ATTRIBUTES + 1), "CP"),
        (Payload.EAP, "01000005", "EAP"),
        (Payload.EAP, "01000004", "EAP"),
        (Payload.EAP, "0300000501", "EAP"),
    ],
)
def test_payloads_that_lie(payload_type, body, field):
    error = malformed(message(payload_type, bytes.fromhex(body)), field)
    assert error.notify == NotifyType.INVALID_SYNTAX


def test_chains_that_lie():
    malformed(encode_message(Message(HEADER, ()))[:16] + b"\x28" + encode_message(Message(HEADER, ()))[17:], "message")
    too_many = Message(HEADER, (VendorIdPayload(b""),) * (MAX_PAYLOADS + 1))
    malformed(encode_message(too_many), "message")
    with pytest.raises(MalformedMessage):
        decode_payloads(Payload.NONCE, b"\0\0\0\3")
    with pytest.raises(MalformedMessage):
        decode_payloads(Payload.NONE, b"\0")
    assert decode_payloads(Payload.NONE, b"") == ()


def test_bounds_of_an_sa_payload():
    proposal = Proposal(1, (Transform(1, 12, 128),))
    at_bound = SaPayload((proposal,) * MAX_PROPOSALS)
    assert decode_message(encode_message(Message(HEADER, (at_bound,)))).payloads == (at_bound,)
    malformed(encode_message(Message(HEADER, (SaPayload((proposal,) * (MAX_PROPOSALS + 1)),))), "SA")
    attributes = ((0x8001, b"\0\1"),) * (MAX_ATTRIBUTES + 1)
    malformed(encode_message(Message(HEADER, (SaPayload((Proposal(1, (Transform(1, 12, 128, attributes),)),)),))), "SA.transform")


def test_an_empty_sa_payload_offers_nothing():
    assert decode_message(message(Payload.SA, b"")).payloads == (SaPayload(()),)


def test_opaque_ports_are_kept_apart():
    body = bytes.fromhex("01000000 07110010 ffff0000 0a000000 0a0000ff")
    (payload,) = decode_message(message(Payload.TSI, body)).payloads
    assert payload == TsiPayload((), (UnknownSelector(7, 17, bytes.fromhex("ffff00000a0000000a0000ff")),))
    assert encode_payloads((payload,))[1][4:] == body


def test_reserved_octets_of_an_identity_do_not_matter():
    (payload,) = decode_message(message(Payload.IDI, b"\x01\xff\xff\xff\x0a\0\0\1")).payloads
    assert payload.identity == Identity(IdType.IPV4_ADDR, ip_address("10.0.0.1").packed)


def test_a_payload_that_does_not_fit_is_an_error_of_the_caller():
    with pytest.raises(ValueError):
        encode_message(Message(HEADER, (VendorIdPayload(bytes(70000)),)))


def test_numbers_without_a_name_print_as_numbers():
    assert name_of(Exchange, 35) == "IKE_AUTH"
    assert name_of(Exchange, 240) == "240"
