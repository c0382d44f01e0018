"""Proposals: swanctl words, and the choice of RFC 7296 sections 2.7 and 3.3."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import Capabilities
from vpnd.ike.algorithms import MAX_PROPOSALS
from vpnd.ike.crypto.groups import implemented_groups
from vpnd.ike.iana import Encryption, Esn, Group, Integrity, PrfId, ProtocolId, TransformType
from vpnd.ike.keymat import IkeSuite
from vpnd.ike.proposal import (
    NONE,
    Proposal,
    Transform,
    accept,
    default_proposals,
    number_proposals,
    parse_proposals,
    proposal_text,
    select,
    within,
)

IKE, ESP = ProtocolId.IKE, ProtocolId.ESP


def one(protocol: ProtocolId, text: str) -> Proposal:
    (proposal,) = parse_proposals(protocol, text)
    return proposal


@pytest.mark.parametrize(
    ("protocol", "text", "printed"),
    [
        (IKE, "aes128gcm16-prfsha256-x25519", "AES_GCM_16-128/PRF_HMAC_SHA2_256/CURVE_25519"),
        (IKE, "aes256-sha256-ecp256", "AES_CBC-256/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/ECP_256"),
        (IKE, "aes-sha1-modp2048", "AES_CBC-128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048"),
        (IKE, "aes128gcm-sha384-ecp384", "AES_GCM_16-128/PRF_HMAC_SHA2_384/ECP_384"),
        (IKE, "AES256GCM128-PRFSHA512-CURVE448", "AES_GCM_16-256/PRF_HMAC_SHA2_512/CURVE_448"),
        (IKE, "aes256-sha512-prfsha256-x25519-ecp384", "AES_CBC-256/HMAC_SHA2_512_256/PRF_HMAC_SHA2_256/CURVE_25519/ECP_384"),
        (IKE, "aes256gcm16-sha384-x25519-ke2_none-ke1_mlkem768", "AES_GCM_16-256/PRF_HMAC_SHA2_384/CURVE_25519/KE1_ML_KEM_768/KE2_NONE"),
        (IKE, "aes192ctr-sha256-modp8192", "AES_CTR-192/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/MODP_8192"),
        (ESP, "aes128gcm16", "AES_GCM_16-128/NO_EXT_SEQ"),
        (ESP, "chacha20poly1305-esn-noesn", "CHACHA20_POLY1305/EXT_SEQ/NO_EXT_SEQ"),
        (ESP, "aes256-sha256-x25519-esn", "AES_CBC-256/HMAC_SHA2_256_128/CURVE_25519/EXT_SEQ"),
        (ESP, "aes256-aes128-sha512", "AES_CBC-256/AES_CBC-128/HMAC_SHA2_512_256/NO_EXT_SEQ"),
        (ESP, "null-sha256", "NULL/HMAC_SHA2_256_128/NO_EXT_SEQ"),
        (ESP, "aes128ctr-sha384-ecp256-modpnone", "AES_CTR-128/HMAC_SHA2_384_192/ECP_256/NONE/NO_EXT_SEQ"),
    ],
)
def test_words_become_transforms(protocol, text, printed):
    assert str(one(protocol, text)) == printed


@pytest.mark.parametrize(
    ("protocol", "text", "complaint"),
    [
        (IKE, "3des-sha1-modp2048", "'3des'"),
        (IKE, "aes128-md5-modp2048", "'md5'"),
        (IKE, "aes128-sha256-modp1024", "'modp1024'"),
        (IKE, "aes128gcm16-prfsha256-x25519-ke1_mlkem512", "'ke1_mlkem512'"),
        (IKE, "aes128gcm16-prfsha256-x25519-ke8_mlkem768", "'ke8_mlkem768'"),
        (IKE, "aes128gcm16-prfsha256-ke1_mlkem768", "no key exchange"),
        (ESP, "aes128gcm16-ke1_mlkem768", "without a first one"),
        (IKE, "aes128gcm16-prfsha256-x25519-esn", "'esn'"),
        (IKE, "null-sha256-x25519", "'null'"),
        (ESP, "aes128gcm16-prfsha256", "'prfsha256'"),
        (IKE, "aes128gcm16--x25519", "''"),
        (IKE, "sha256-x25519", "no encryption"),
        (IKE, "aes128gcm16-prfsha256", "no key exchange"),
        (IKE, "aes128gcm16-x25519", "no PRF"),
        (IKE, "aes128-prfsha256-x25519", "no integrity"),
        (ESP, "aes128", "no integrity"),
        (IKE, "aes128-aes128gcm16-sha256-x25519", "combined-mode"),
        (IKE, "", "empty"),
        (IKE, "default,", "empty"),
        (ProtocolId.AH, "sha256", "AH"),
        (ESP, ",".join(["default"] * MAX_PROPOSALS), "at most"),
    ],
)
def test_bad_text_is_refused_by_name(protocol, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_proposals(protocol, text)


def test_a_list_is_numbered():
    proposals = parse_proposals(IKE, "aes128gcm16-prfsha256-x25519 , default")
    assert [proposal.number for proposal in proposals] == [1, 2, 3, 4]
    assert proposals[1].transforms == default_proposals(IKE)[0].transforms
    assert [(p.number, p.spi) for p in number_proposals(proposals[1:], b"spi!")] == [(1, b"spi!"), (2, b"spi!"), (3, b"spi!")]
    assert proposal_text(proposals[:1]) == "IKE:AES_GCM_16-128/PRF_HMAC_SHA2_256/CURVE_25519"


def test_defaults_are_strong_and_implemented():
    weak = {
        TransformType.ENCR: {Encryption.NULL, Encryption.DES_CBC, Encryption.TRIPLE_DES_CBC},
        TransformType.PRF: {PrfId.HMAC_MD5, PrfId.HMAC_SHA1},
        TransformType.INTEG: {Integrity.HMAC_MD5_96, Integrity.HMAC_SHA1_96},
        TransformType.KE: {Group.MODP_768, Group.MODP_1024, Group.MODP_1536},
    }
    for protocol in (IKE, ESP):
        for proposal in default_proposals(protocol):
            assert not any(transform.id in weak.get(transform.type, ()) for transform in proposal.transforms)
    for proposal in default_proposals(IKE):
        assert set(proposal.groups) <= implemented_groups()
        assert IkeSuite.of(select((proposal,), (proposal,)))
    assert default_proposals(IKE)[0].groups[0] == Group.CURVE_25519


def test_the_choice_has_the_peers_number_and_spi_and_one_transform_a_type():
    offered = tuple(proposal.with_spi(b"\1\2\3\4") for proposal in parse_proposals(ESP, "aes128-sha256,aes256gcm16-aes128gcm16-esn-noesn"))
    chosen = select(parse_proposals(ESP, "aes128gcm16"), offered)
    assert (chosen.number, chosen.spi, str(chosen)) == (2, b"\1\2\3\4", "AES_GCM_16-128/NO_EXT_SEQ")
    assert not chosen.esn
    assert chosen.esp_algorithm() == EspAlgorithm(EncryptionId.AES_GCM_16, 128)
    assert accept(offered, (chosen.with_spi(b"mine"),)) == chosen.with_spi(b"mine")


def test_whose_order_decides():
    ours = parse_proposals(IKE, "aes256-sha512-ecp384-x25519,aes128gcm16-prfsha256-x25519")
    theirs = parse_proposals(IKE, "aes128gcm16-prfsha256-x25519,aes256-sha512-x25519-ecp384")
    assert str(select(ours, theirs)) == "AES_GCM_16-128/PRF_HMAC_SHA2_256/CURVE_25519"
    preferred = select(ours, theirs, prefer_configured=True)
    assert (preferred.number, str(preferred)) == (2, "AES_CBC-256/HMAC_SHA2_512_256/PRF_HMAC_SHA2_512/ECP_384")


def test_the_group_of_the_ke_payload_is_taken_where_it_is_allowed():
    offered = parse_proposals(IKE, "aes128gcm16-prfsha256-x25519-ecp256-modp4096")
    ours = parse_proposals(IKE, "aes128gcm16-prfsha256-x25519-ecp256")
    assert select(ours, offered, group=Group.ECP_256).groups == (Group.ECP_256,)
    assert select(ours, offered, group=Group.MODP_4096).groups == (Group.CURVE_25519,)


@pytest.mark.parametrize(
    ("protocol", "ours", "theirs"),
    [
        (IKE, "aes128gcm16-prfsha256-x25519", "aes256gcm16-prfsha256-x25519"),
        (IKE, "aes128gcm16-prfsha256-x25519", "aes128gcm16-prfsha384-x25519"),
        (IKE, "aes128gcm16-prfsha256-x25519", "aes128gcm16-prfsha256-ecp256"),
        (IKE, "aes128-sha256-x25519", "aes128-sha384-prfsha256-x25519"),
        (ESP, "aes128gcm16-esn", "aes128gcm16"),
        (ESP, "aes128gcm16-x25519", "aes128gcm16"),
        (ESP, "aes128gcm16", "aes128gcm16-x25519"),
        (ESP, "aes128-sha256", "aes128gcm16"),
    ],
)
def test_nothing_in_common_is_no_choice(protocol, ours, theirs):
    assert select(parse_proposals(protocol, ours), parse_proposals(protocol, theirs)) is None


def test_nothing_is_chosen_from_nothing_or_from_another_protocol():
    assert select(default_proposals(ESP), ()) is None
    assert select((), default_proposals(ESP)) is None
    assert select(default_proposals(ESP), tuple(replace(p, protocol=ProtocolId.AH) for p in default_proposals(ESP))) is None


def test_pfs_is_optional_where_a_side_says_none():
    with_none, without, with_dh = (one(ESP, text) for text in ("aes128gcm16-x25519-modpnone", "aes128gcm16", "aes128gcm16-x25519"))
    assert select((with_none,), (without,)).groups == ()
    assert select((with_none,), (with_dh,)).groups == (Group.CURVE_25519,)
    assert select((without,), (with_none,)).first(TransformType.KE).id == NONE
    assert with_dh.without_key_exchange() == without


def test_an_absent_esn_transform_means_none():
    offered = Proposal(ESP, (Transform(TransformType.ENCR, Encryption.AES_GCM_16, 128),))
    assert str(select(parse_proposals(ESP, "aes128gcm16-esn-noesn"), (offered,))) == "AES_GCM_16-128"
    assert select(parse_proposals(ESP, "aes128gcm16-esn"), (offered,)) is None


def test_integrity_beside_a_combined_mode_cipher():
    gcm, esn = Transform(TransformType.ENCR, Encryption.AES_GCM_16, 128), Transform(TransformType.ESN, Esn.NONE)
    none, sha = Transform(TransformType.INTEG, Integrity.NONE), Transform(TransformType.INTEG, Integrity.HMAC_SHA2_256_128)
    ours = parse_proposals(ESP, "aes128gcm16,aes128-sha256")
    assert select(ours, (Proposal(ESP, (gcm, none, esn)),)).integrity is None
    assert select(ours, (Proposal(ESP, (gcm, sha, esn)),)) is None
    mixed = Proposal(ESP, (gcm, Transform(TransformType.ENCR, Encryption.AES_CBC, 128), sha, esn))
    assert str(select(ours, (mixed,))) == "AES_CBC-128/HMAC_SHA2_256_128/NO_EXT_SEQ"


def test_unknown_transform_types_and_attributes_are_never_chosen():
    ours = parse_proposals(IKE, "aes128gcm16-prfsha256-x25519")
    (theirs,) = ours
    assert select(ours, (replace(theirs, transforms=(*theirs.transforms, Transform(200, NONE))),)) is None
    strange = tuple(replace(t, attributes=((0x8001, b"\0\1"),)) if t.type == TransformType.PRF else t for t in theirs.transforms)
    assert select(ours, (replace(theirs, transforms=strange),)) is None
    assert select(ours, (replace(theirs, transforms=(*strange, theirs.prf)),)) is not None


def test_additional_key_exchanges_are_left_out_only_where_the_peer_allows_it():
    ours = parse_proposals(IKE, "aes128gcm16-prfsha256-x25519")
    additional = Transform(TransformType.AKE1, Group.ML_KEM_768)
    (theirs,) = ours
    assert select(ours, (replace(theirs, transforms=(*theirs.transforms, additional)),)) is None
    chosen = select(ours, (replace(theirs, transforms=(*theirs.transforms, additional, Transform(TransformType.AKE1, NONE))),))
    assert chosen.first(TransformType.AKE1).id == NONE


def test_an_answer_that_was_not_offered_is_refused():
    sent = parse_proposals(IKE, "aes128gcm16-prfsha256-x25519-ecp256,aes128-sha256-x25519")
    good = select(sent, sent)
    assert accept(sent, (good,)) == good
    other = one(IKE, "aes256gcm16-prfsha256-x25519")
    for bad in ((), (good, good), (good.numbered(2),), (good.numbered(9),), (other,), (sent[0],), (replace(good, protocol=ESP),)):
        assert accept(sent, bad) is None
    for kind in (TransformType.ENCR, TransformType.PRF, TransformType.KE):
        assert accept(sent, (replace(good, transforms=tuple(t for t in good.transforms if t.type != kind)),)) is None
    second = select(sent, sent[1:])
    assert accept(sent, (replace(second, transforms=tuple(t for t in second.transforms if t.type != TransformType.INTEG)),)) is None
    assert accept(sent, (replace(good, transforms=(*good.transforms, second.integrity)),)) is None


def kernel(*algorithms: EspAlgorithm, esn: bool = True) -> Capabilities:
    return Capabilities("test", frozenset(algorithms), esn=esn)


def test_proposals_are_cut_to_what_the_kernel_can_do():
    proposals = parse_proposals(ESP, "aes256gcm16-aes128gcm16-chacha20poly1305-esn-noesn,aes256-aes128-sha256-sha384-sha512-esn-noesn")
    sha512 = EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA2_512_256)
    assert [str(p) for p in within(proposals, kernel(sha512, esn=False))] == ["AES_CBC-128/HMAC_SHA2_512_256/NO_EXT_SEQ"]
    gcm = EspAlgorithm(EncryptionId.AES_GCM_16, 128)
    assert [str(p) for p in within(proposals, kernel(gcm))] == ["AES_GCM_16-128/EXT_SEQ/NO_EXT_SEQ"]
    assert within(parse_proposals(ESP, "aes128gcm16-esn"), kernel(gcm, esn=False)) == ()
    assert within(proposals, kernel()) == ()
    chacha = EspAlgorithm(EncryptionId.CHACHA20_POLY1305, 256)
    assert [str(p) for p in within(proposals, kernel(chacha, esn=False))] == ["CHACHA20_POLY1305/NO_EXT_SEQ"]


def test_a_proposal_of_which_only_some_combinations_work_is_split():
    algorithms = (
        EspAlgorithm(EncryptionId.AES_CBC, 256, IntegrityId.HMAC_SHA2_256_128),
        EspAlgorithm(EncryptionId.AES_CBC, 128, IntegrityId.HMAC_SHA2_512_256),
    )
    parts = within(parse_proposals(ESP, "aes256-aes128-sha256-sha512"), kernel(*algorithms))
    assert [str(p) for p in parts] == ["AES_CBC-256/HMAC_SHA2_256_128/NO_EXT_SEQ", "AES_CBC-128/HMAC_SHA2_512_256/NO_EXT_SEQ"]


def test_a_choice_that_no_kernel_knows_has_no_esp_algorithm():
    for transforms in ((), (Transform(TransformType.ENCR, Encryption.DES_CBC),)):
        with pytest.raises(ValueError):
            Proposal(ESP, transforms).esp_algorithm()


WORDS = ["aes128gcm16", "aes256gcm16", "chacha20poly1305", "aes128", "aes256", "sha256", "sha512", "x25519", "ecp256", "modpnone", "esn", "noesn"]


@st.composite
def esp_proposals(draw: st.DrawFn) -> tuple[Proposal, ...]:
    proposals: list[Proposal] = []
    for words in draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6, unique=True), min_size=1, max_size=3)):
        with contextlib.suppress(ValueError):
            proposals.extend(parse_proposals(ESP, "-".join(words)))
    return number_proposals(proposals, b"peer")


@settings(max_examples=200)
@given(esp_proposals(), esp_proposals(), st.booleans(), st.sampled_from([None, Group.CURVE_25519, Group.ECP_256]))
def test_what_a_responder_chooses_both_sides_allow(ours, theirs, prefer_configured, wanted):
    chosen = select(ours, theirs, prefer_configured=prefer_configured, group=wanted)
    if chosen is None:
        assert not any(set(own.transforms) == set(other.transforms) for own in ours for other in theirs)
        return
    assert accept(theirs, (chosen,)) == chosen
    assert any(set(chosen.transforms) <= {*own.transforms, Transform(TransformType.KE, NONE)} for own in ours)
    assert chosen.esp_algorithm().aead or chosen.integrity is not None
