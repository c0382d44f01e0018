"""One scripted PF_KEY conversation, for any kernel that speaks Linux' dialect: what is said, and what each client then hears.

A step's outcome is one line: what the manager, who speaks, hears and, after `|`, what a second client hears that is not registered. An answer is
`TYPE(extensions)`, sorted by name, or the name of its errno, whether the kernel refuses the call that sends or replies; `=` is what the manager hears.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final, Protocol

from kernel_shim.pfkey.codec import Codec, header_of
from kernel_shim.pfkey.constants import AuthAlgorithm, EncryptAlgorithm, ExtensionType, MessageType, SaType
from kernel_shim.pfkey.messages import (
    Address,
    Extension,
    IpsecRequest,
    Key,
    LifetimeExtension,
    Message,
    NatTPort,
    NatTType,
    PfKeyError,
    PolicyExtension,
    Sa,
    Sa2,
    SpiRange,
    message_name,
)
from kernel_shim.secret import Secret
from kernel_shim.tool.decode import name_of

HERE, PEER = ip_address("192.0.2.1"), ip_address("192.0.2.2")
NEAR, FAR = ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")
REQID: Final = 7
SPI: Final = 0x1000
DUMPED: Final = 0x1200
SHORT_LIVED: Final = 0x1100
TUNNEL: Final = 2
INBOUND, OUTBOUND, FORWARD = 1, 2, 3
DISCARD, NONE, PROTECT = 0, 1, 2
PID: Final = 4242

_CODEC: Final = Codec()
_HEADER: Final = struct.Struct("=BBBBHHII")
_GROUPS: Final = ("address", "key", "lifetime", "supported", "x_nat_t")
_M: Final = MessageType
_E: Final = ExtensionType


class Kernel(Protocol):
    """Two clients of a kernel whose SAD and SPD are empty."""

    def say(self, data: bytes) -> int:
        """The manager sends one datagram; the errno with which the call was refused, or 0."""

    def heard(self, *, manager: bool) -> list[bytes]:
        """All that the manager, or the other client, was sent by now."""

    def provoke(self) -> None:
        """One packet from NEAR to FAR."""

    def age(self, expected: int) -> list[bytes]:
        """Lets time go by until a message of the type `expected` comes, and gives all that the manager was sent."""


@dataclass
class Notes:
    """What later steps need of earlier answers."""

    sequence: int = 1000
    spi: int = 0
    index: int = 0
    acquire: int = 0

    def next(self) -> int:
        self.sequence += 1
        return self.sequence


@dataclass(frozen=True)
class Step:
    name: str
    say: Callable[[Notes], bytes] | None = None
    provoke: bool = False
    age: int = 0  # the type of message to wait for
    learn: Callable[[Notes, Message], None] | None = field(default=None, compare=False)


def talk(kernel: Kernel, steps: Sequence[Step]) -> dict[str, str]:
    """The outcome of each step."""
    notes, outcomes = Notes(), dict[str, str]()
    for step in steps:
        refused, heard = 0, list[bytes]()
        if step.say is not None:
            refused = kernel.say(step.say(notes))
        if step.provoke:
            kernel.provoke()
        if step.age:
            heard = kernel.age(step.age)
        heard += kernel.heard(manager=True)
        if step.learn is not None:
            for data in heard:
                step.learn(notes, _CODEC.decode(data, from_kernel=True))
        own = [_errno(refused)] if refused else [_shown(data, notes) for data in heard]
        others = [_shown(data, notes) for data in kernel.heard(manager=False)]
        outcomes[step.name] = " ".join(own or ["-"]) + (" | " + ("=" if others == own else " ".join(others)) if others else "")
    return outcomes


def _errno(number: int) -> str:
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode[number]


def _shown(data: bytes, notes: Notes) -> str:
    header = header_of(data)
    if header.errno:
        return _errno(header.errno)
    try:
        message = _CODEC.decode(data, from_kernel=True)
    except PfKeyError as error:
        return f"{message_name(header.type)}: malformed ({error.field})"
    whose = "" if (message.sequence, message.pid) == (notes.sequence, PID) else f"#{message.sequence}" if message.pid == PID else "!"
    return f"{message_name(message.type)}{whose}({_names(message)})"


def _names(message: Message) -> str:
    """`address:dst,src lifetime:current,hard,soft sa`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(name_of(it).lower() for it in message.extensions):
        group = next((group for group in _GROUPS if name.startswith(f"{group}_")), name)
        groups.setdefault(group, []).extend([name.removeprefix(f"{group}_")] if group != name else [])
    return " ".join(f"{group}:{','.join(members)}" if members else group for group, members in groups.items())


# What is said


def _message(kind: int, *extensions: Extension, sa_type: int = SaType.ESP) -> Callable[[Notes], bytes]:
    def build(notes: Notes) -> bytes:
        return _CODEC.encode(Message(kind, sa_type, 0, notes.next(), PID, extensions))

    return build


def _later(make: Callable[[Notes], Message]) -> Callable[[Notes], bytes]:
    return lambda notes: _CODEC.encode(replace(make(notes), sequence=notes.next(), pid=PID))


def _raw(build: Callable[[bytes], bytes], message: Callable[[Notes], bytes]) -> Callable[[Notes], bytes]:
    return lambda notes: build(message(notes))


def _ends(source: object = HERE, destination: object = PEER) -> tuple[Extension, ...]:
    def one(kind: ExtensionType, address: object) -> Address:
        ip = ip_address(str(address))
        return Address(kind, ip, 0, ip.max_prefixlen)

    return one(_E.ADDRESS_SRC, source), one(_E.ADDRESS_DST, destination)


def _key(spi: int, octets: int) -> Secret:
    """Another one for each SA: ours refuses to use an outbound key again."""
    return Secret(bytes((spi + number) & 0xFF for number in range(octets)))


def _sa(
    kind: int = _M.ADD,
    spi: int = SPI,
    *,
    auth: int = AuthAlgorithm.SHA1HMAC,
    encrypt: int = EncryptAlgorithm.X_AESCBC,
    auth_octets: int = 20,
    encrypt_octets: int = 16,
    mode: int = TUNNEL,
    ends: tuple[Extension, ...] = _ends(),
    encapsulated: bool = True,
    lifetimes: Mapping[ExtensionType, int] = {_E.LIFETIME_HARD: 4000, _E.LIFETIME_SOFT: 3000},
    without: ExtensionType | None = None,
    more: tuple[Extension, ...] = (),
    sa_type: int = SaType.ESP,
) -> Callable[[Notes], bytes]:
    extensions: tuple[Extension, ...] = (
        Sa(spi, 32, 1, auth, encrypt),
        *ends,
        Key(_E.KEY_AUTH, _key(spi, auth_octets), auth_octets * 8),
        Key(_E.KEY_ENCRYPT, _key(spi, encrypt_octets), encrypt_octets * 8),
        Sa2(mode, 0, REQID),
        *(LifetimeExtension(which, addtime=seconds) for which, seconds in lifetimes.items()),
        *((NatTType(2), NatTPort(_E.X_NAT_T_SPORT, 4500), NatTPort(_E.X_NAT_T_DPORT, 4500)) if encapsulated else ()),
        *more,
    )
    return _message(kind, *(it for it in extensions if getattr(it, "type", None) is not without), sa_type=sa_type)


def _named(kind: int, spi: int = SPI, destination: object = PEER, *, sa_type: int = SaType.ESP) -> Callable[[Notes], bytes]:
    return _message(kind, Sa(spi), *_ends(HERE, destination), sa_type=sa_type)


_REQUEST: Final = IpsecRequest(50, TUNNEL, 3, REQID, HERE, PEER)


def _policy(
    kind: int = _M.X_SPDADD,
    *,
    direction: int = OUTBOUND,
    action: int = PROTECT,
    priority: int = 1000,
    requests: tuple[IpsecRequest, ...] = (_REQUEST,),
    more: tuple[Extension, ...] = (),
) -> Callable[[Notes], bytes]:
    near, far = (NEAR, FAR) if direction == OUTBOUND else (FAR, NEAR)
    return _message(
        kind,
        Address(_E.ADDRESS_SRC, near.network_address, 0, near.prefixlen, 255),
        Address(_E.ADDRESS_DST, far.network_address, 0, far.prefixlen, 255),
        PolicyExtension(action, direction, 0, priority, requests),
        *more,
        sa_type=SaType.UNSPEC,
    )


def _of_index(kind: int) -> Callable[[Notes], bytes]:
    return _later(lambda notes: Message(kind, extensions=(PolicyExtension(0, 0, notes.index),)))


def _learn_spi(notes: Notes, message: Message) -> None:
    found = message.find(Sa)
    notes.spi = found.spi if found is not None else notes.spi


def _learn_index(notes: Notes, message: Message) -> None:
    found = message.find(PolicyExtension)
    notes.index = found.id if found is not None else notes.index


def _learn_acquire(notes: Notes, message: Message) -> None:
    if message.type == _M.ACQUIRE:
        notes.acquire = message.sequence


def _header(data: bytes, *, version: int = 2, kind: int | None = None, words: int = 0, reserved: int = 0) -> bytes:
    """`data` with another header; `words` is added to the length that it announces."""
    old = list(_HEADER.unpack_from(data))
    old[0], old[4], old[5] = version, old[4] + words, reserved
    if kind is not None:
        old[1] = kind
    return _HEADER.pack(*old) + data[16:]


def _with_extension(octets: bytes) -> Callable[[bytes], bytes]:
    """One more extension, raw; the header counts it."""
    return lambda data: _header(data + octets, words=len(octets) // 8)


def _extension(words: int, kind: int, body: bytes) -> bytes:
    return struct.pack("=HH", words, kind) + body


def _address(*, words: int = 3, prefix: int = 32, family: int = 2, octets: int = 16) -> bytes:
    return _extension(words, _E.ADDRESS_PROXY, struct.pack("=BBHH", 0, prefix, 0, family)).ljust(octets + 8, b"\0")


GET: Final = _named(_M.GET)


def _steps() -> Iterator[Step]:
    yield Step("a header cut short", _raw(lambda data: data[:12], GET))
    yield Step("version 1", _raw(lambda data: _header(data, version=1), GET))
    yield Step("a reserved field in the header", _raw(lambda data: _header(data, reserved=1), GET))
    yield Step("message type 0", _raw(lambda data: _header(data, kind=0), GET))
    yield Step("message type 25", _raw(lambda data: _header(data, kind=25), GET))
    yield Step("a length beyond the message", _raw(lambda data: _header(data, words=1), GET))
    yield Step("a length short of the message", _raw(lambda data: _header(data, words=-1), GET))
    yield Step("an extension of no length", _raw(_with_extension(_extension(0, 200, bytes(4))), GET))
    yield Step("an extension beyond the message", _raw(_with_extension(_extension(9, 200, bytes(4))), GET))
    yield Step("extension type 0", _raw(_with_extension(_extension(1, 0, bytes(4))), GET))
    yield Step("an unknown extension", _raw(_with_extension(_extension(1, 200, bytes(4))), GET))
    yield Step("an extension twice", _raw(_with_extension(_extension(2, _E.SA, bytes(12))), GET))
    yield Step("an address of another length", _raw(_with_extension(_address(words=4, octets=24)), GET))
    yield Step("a prefix of 33 bits", _raw(_with_extension(_address(prefix=33)), GET))
    yield Step("address family 99", _raw(_with_extension(_address(family=99)), GET))
    yield Step("a key shorter than its bits", _raw(_with_extension(_extension(2, _E.KEY_AUTH, struct.pack("=HH", 160, 0) + bytes(8))), GET))
    for kind in (_M.EXPIRE, _M.X_PCHANGE, _M.X_SPDACQUIRE, _M.X_SPDEXPIRE, _M.X_NAT_T_NEW_MAPPING):
        yield Step(f"{kind.name} from a client", _message(kind))

    yield Step("REGISTER", _message(_M.REGISTER))
    yield Step("REGISTER again", _message(_M.REGISTER))
    yield Step("REGISTER for AH", _message(_M.REGISTER, sa_type=SaType.AH))
    yield Step("REGISTER for nothing", _message(_M.REGISTER, sa_type=SaType.UNSPEC))
    yield Step("REGISTER for an unknown SA type", _message(_M.REGISTER, sa_type=10))

    request = (SpiRange(0x2000, 0x2FFF), *_ends(PEER, HERE), Sa2(TUNNEL, 0, REQID))
    yield Step("GETSPI", _message(_M.GETSPI, *request), learn=_learn_spi)
    yield Step("GETSPI of a range upside down", _message(_M.GETSPI, SpiRange(0x2FFF, 0x2000), *request[1:]))
    yield Step(
        "GETSPI of an SPI that is taken", _later(lambda notes: Message(_M.GETSPI, SaType.ESP, extensions=(SpiRange(notes.spi, notes.spi), *request[1:])))
    )
    yield Step("GETSPI without a range", _message(_M.GETSPI, *request[1:]))
    yield Step("GETSPI without a destination", _message(_M.GETSPI, request[0], request[1]))
    yield Step("GETSPI of two families", _message(_M.GETSPI, request[0], *_ends(PEER, IPv6Address("2001:db8::1"))))
    yield Step("GETSPI of an unknown mode", _message(_M.GETSPI, *request[:3], Sa2(9, 0, REQID)))
    yield Step("GETSPI for an unknown SA type", _message(_M.GETSPI, *request, sa_type=7))
    yield Step("GET of a larval SA", _later(lambda notes: Message(_M.GET, SaType.ESP, extensions=(Sa(notes.spi), *_ends(PEER, HERE)))))

    yield Step("UPDATE of a larval SA", lambda notes: _sa(_M.UPDATE, notes.spi, ends=_ends(PEER, HERE))(notes))
    yield Step("UPDATE of a mature SA", lambda notes: _sa(_M.UPDATE, notes.spi, ends=_ends(PEER, HERE))(notes))
    yield Step("UPDATE that takes the encapsulation away", lambda notes: _sa(_M.UPDATE, notes.spi, ends=_ends(PEER, HERE), encapsulated=False)(notes))
    yield Step("UPDATE without keys", _message(_M.UPDATE, Sa(SPI, 32, 1, AuthAlgorithm.SHA1HMAC, EncryptAlgorithm.X_AESCBC), *_ends(), Sa2(TUNNEL, 0, REQID)))
    yield Step("UPDATE of none", _sa(_M.UPDATE))
    yield Step("ADD", _sa())
    yield Step("ADD again", _sa())
    yield Step("ADD without its destination", _sa(spi=SPI + 1, ends=_ends()[:1]))
    yield Step("ADD without SA", _sa(spi=SPI + 1, without=_E.SA))
    yield Step("ADD without a key of the cipher", _sa(spi=SPI + 1, without=_E.KEY_ENCRYPT))
    yield Step("ADD without a key of the authentication", _sa(spi=SPI + 1, without=_E.KEY_AUTH))
    yield Step("ADD with a hard lifetime alone", _sa(spi=SPI + 1, lifetimes={_E.LIFETIME_HARD: 4000}))
    yield Step("ADD with a soft lifetime alone", _sa(spi=SPI + 2, lifetimes={_E.LIFETIME_SOFT: 4000}))
    yield Step("ADD without lifetimes", _sa(spi=SPI + 3, lifetimes={}))
    yield Step("ADD with authentication 200", _sa(spi=SPI + 4, auth=200))
    yield Step("ADD with authentication 252", _sa(spi=SPI + 4, auth=252))
    yield Step("ADD with cipher 200", _sa(spi=SPI + 4, encrypt=200))
    yield Step("ADD with cipher 254", _sa(spi=SPI + 4, encrypt=254))
    yield Step("ADD with a cipher key of 7 octets", _sa(spi=SPI + 4, encrypt_octets=7))
    yield Step("ADD with AES-GCM", _sa(spi=SPI + 5, encrypt=EncryptAlgorithm.X_AES_GCM_ICV16, auth=0, encrypt_octets=20, without=_E.KEY_AUTH))
    yield Step("ADD with HMAC-SHA2-256", _sa(spi=SPI + 6, auth=AuthAlgorithm.X_SHA2_256HMAC, auth_octets=32))
    yield Step("ADD with HMAC-SHA2-512", _sa(spi=SPI + 7, auth=AuthAlgorithm.X_SHA2_512HMAC, auth_octets=64))
    yield Step("ADD with AES-CTR", _sa(spi=SPI + 8, encrypt=EncryptAlgorithm.X_AESCTR, encrypt_octets=20))
    yield Step("ADD of an unknown mode", _sa(spi=SPI + 9, mode=9))
    yield Step("ADD without UDP encapsulation", _sa(spi=SPI + 10, encapsulated=False))
    yield Step("ADD for an unknown SA type", _sa(spi=SPI + 11, sa_type=7))
    yield Step("GET", GET)
    yield Step("GET of none", _named(_M.GET, 0x9999))
    yield Step("GET without SA", _message(_M.GET, *_ends()))
    yield Step("GET without addresses", _message(_M.GET, Sa(SPI)))
    yield Step("GET for an unknown SA type", _named(_M.GET, sa_type=7))
    yield Step("DUMP of AH", _message(_M.DUMP, sa_type=SaType.AH))
    yield Step("DUMP for an unknown SA type", _message(_M.DUMP, sa_type=7))
    yield Step("FLUSH", _message(_M.FLUSH))
    yield Step("FLUSH of nothing", _message(_M.FLUSH))
    yield Step("FLUSH for an unknown SA type", _message(_M.FLUSH, sa_type=7))
    yield Step("DUMP of nothing", _message(_M.DUMP))
    yield Step("ADD of one to be dumped", _sa(spi=DUMPED))
    yield Step("ADD of another to be dumped", _sa(spi=DUMPED + 1))
    yield Step("DUMP", _message(_M.DUMP))
    yield Step("DELETE of none", _named(_M.DELETE, 0x9999))
    yield Step("DELETE without SA", _message(_M.DELETE, *_ends()))
    yield Step("DELETE for an unknown SA type", _named(_M.DELETE, DUMPED, sa_type=7))
    yield Step("DELETE", _named(_M.DELETE, DUMPED))
    yield Step("DELETE again", _named(_M.DELETE, DUMPED))
    yield Step("DELETE of the last", _named(_M.DELETE, DUMPED + 1))

    yield Step("SPDDUMP of nothing", _message(_M.X_SPDDUMP))
    yield Step("SPDFLUSH of nothing", _message(_M.X_SPDFLUSH, sa_type=SaType.UNSPEC))
    yield Step("SPDADD", _policy(), learn=_learn_index)
    yield Step("SPDADD again", _policy())
    yield Step("SPDADD of another priority", _policy(priority=2000))
    yield Step("SPDUPDATE", _policy(_M.X_SPDUPDATE, priority=2000))
    yield Step("SPDUPDATE of none", _policy(_M.X_SPDUPDATE, direction=INBOUND))
    yield Step("SPDSETIDX", _policy(_M.X_SPDSETIDX, direction=FORWARD))
    yield Step("SPDADD without a policy", _message(_M.X_SPDADD, *_ends()))
    yield Step("SPDADD without addresses", _message(_M.X_SPDADD, PolicyExtension(PROTECT, OUTBOUND, 0, 0, (_REQUEST,))))
    yield Step("SPDADD without direction", _policy(direction=0))
    yield Step("SPDADD of direction 4", _policy(direction=4))
    yield Step("SPDADD of type 3", _policy(action=3, direction=INBOUND))
    yield Step("SPDADD that protects with TCP", _policy(requests=(replace(_REQUEST, protocol=6),)))
    yield Step("SPDADD that protects with AH", _policy(_M.X_SPDUPDATE, direction=FORWARD, requests=(replace(_REQUEST, protocol=51),)))
    yield Step("SPDADD of mode 0", _policy(requests=(replace(_REQUEST, mode=0),)))
    yield Step("SPDADD of mode 9", _policy(requests=(replace(_REQUEST, mode=9),)))
    yield Step("SPDADD of a tunnel without ends", _policy(requests=(replace(_REQUEST, source=None, destination=None),)))
    yield Step("SPDADD of seven templates", _policy(requests=(_REQUEST,) * 7))
    yield Step("SPDADD that protects with nothing", _policy(_M.X_SPDUPDATE, direction=FORWARD, requests=()))
    yield Step("SPDUPDATE to discard", _policy(_M.X_SPDUPDATE, direction=FORWARD, action=DISCARD, requests=()))
    yield Step("SPDUPDATE to let pass", _policy(_M.X_SPDUPDATE, direction=FORWARD, action=NONE, requests=()))
    yield Step("SPDUPDATE with a reqid over 16383", _policy(_M.X_SPDUPDATE, direction=FORWARD, requests=(replace(_REQUEST, reqid=70000),)))
    yield Step("SPDGET", _of_index(_M.X_SPDGET))
    yield Step("SPDGET of none", _message(_M.X_SPDGET, PolicyExtension(0, OUTBOUND, 99993)))
    yield Step("SPDGET without a policy", _message(_M.X_SPDGET))
    yield Step("SPDGET of a direction that is none", _message(_M.X_SPDGET, PolicyExtension(0, 0, 7)))
    yield Step("SPDDUMP", _message(_M.X_SPDDUMP, sa_type=SaType.UNSPEC))
    yield Step("SPDDELETE of none", _message(_M.X_SPDDELETE, *_ends(), PolicyExtension(0, OUTBOUND)))
    yield Step("SPDDELETE without a policy", _message(_M.X_SPDDELETE, *_ends()))
    yield Step("SPDDELETE", _policy(_M.X_SPDDELETE, direction=INBOUND))
    yield Step("SPDDELETE2 of none", _message(_M.X_SPDDELETE2, PolicyExtension(0, OUTBOUND, 99993)))
    yield Step("SPDDELETE2 without a policy", _message(_M.X_SPDDELETE2))

    yield Step("a packet without an SA", provoke=True, learn=_learn_acquire)
    yield Step("another packet without an SA", provoke=True)
    yield Step("ACQUIRE with extensions", _message(_M.ACQUIRE, *_ends()))
    yield Step("ACQUIRE that nobody made is given up", _message(_M.ACQUIRE))
    yield Step("an ACQUIRE is given up", lambda notes: _CODEC.encode(Message(_M.ACQUIRE, SaType.ESP, errno.ETIMEDOUT, notes.acquire, PID)))
    yield Step("SPDDELETE2", _of_index(_M.X_SPDDELETE2))
    yield Step("SPDFLUSH", _message(_M.X_SPDFLUSH, sa_type=SaType.UNSPEC))

    yield Step("ADD that lives shortly", _sa(spi=SHORT_LIVED, lifetimes={_E.LIFETIME_HARD: 8, _E.LIFETIME_SOFT: 2}))
    yield Step("its soft lifetime ends", age=_M.EXPIRE)
    yield Step("its hard lifetime ends", age=_M.EXPIRE)
    yield Step("GET of an SA that expired", _named(_M.GET, SHORT_LIVED))

    yield Step("PROMISC", _message(_M.X_PROMISC, sa_type=1))
    yield Step("a copy for who is promiscuous", GET)
    yield Step("PROMISC no more", _message(_M.X_PROMISC, sa_type=0))
    yield Step("PROMISC, neither on nor off", _message(_M.X_PROMISC, sa_type=2))
    yield Step("MIGRATE without a policy", _message(_M.X_MIGRATE, *_ends()))
    yield Step("MIGRATE of none", _policy(_M.X_MIGRATE, requests=(_REQUEST, replace(_REQUEST, destination=ip_address("192.0.2.3")))))


STEPS: Final = tuple(_steps())
