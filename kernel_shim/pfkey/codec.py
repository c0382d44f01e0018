"""PF_KEY messages to octets and back (RFC 2367 section 2).

`decode` raises PfKeyError and nothing else. Extensions that have no layout here survive as `UnknownExtension`
(RFC 2367 section 2.3: unknown ones are ignored, the rest of the message counts); a known one must not come twice.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from struct import Struct
from typing import Final

from kernel_shim.pfkey.constants import (
    EXTENSION_HEADER_LENGTH,
    HEADER_LENGTH,
    MAX_EXTENSIONS,
    PF_KEY_V2,
    WORD,
    ExtensionType,
)
from kernel_shim.pfkey.dialects import LINUX, Dialect
from kernel_shim.pfkey.layouts import LAYOUTS, Layout
from kernel_shim.pfkey.messages import Extension, Message, PfKeyError, UnknownExtension
from kernel_shim.pfkey.private_layouts import PRIVATE_LAYOUTS
from kernel_shim.pfkey.wire import Reader, Writer

_ALL_LAYOUTS: Final[Mapping[ExtensionType, Layout]] = {**LAYOUTS, **PRIVATE_LAYOUTS}
_HEADER: Final = Struct("=BBBBHHII")
_EXTENSION: Final = Struct("=HH")
_LENGTH: Final = Struct("=H")
_LENGTH_AT: Final = 4  # of sadb_msg_len


class Codec:
    """The codec of one dialect."""

    def __init__(self, dialect: Dialect = LINUX) -> None:
        self.dialect = dialect
        self._numbers = {kind: number for kind in _ALL_LAYOUTS if (number := dialect.number(kind)) is not None}
        self._readers = {number: (kind, kind.name, _ALL_LAYOUTS[kind].read) for kind, number in self._numbers.items()}

    def decode(self, data: bytes, *, from_kernel: bool = False) -> Message:
        """The message that `data`, one datagram, holds. EMSGSIZE when its length is not the one it announces, else EINVAL.

        `from_kernel`: Linux tells of a policy how often it is referred to, in sadb_msg_reserved (pfkey_xfrm_policy2msg).
        """
        if len(data) < HEADER_LENGTH:
            raise PfKeyError("sadb_msg", f"{len(data)} octets", errno.EMSGSIZE)
        version, kind, number, sa_type, words, reserved, sequence, pid = _HEADER.unpack_from(data)
        if version != PF_KEY_V2:
            raise PfKeyError("sadb_msg_version", str(version))
        if reserved != 0 and not from_kernel:
            raise PfKeyError("sadb_msg_reserved", str(reserved))
        if words * WORD != len(data):
            raise PfKeyError("sadb_msg_len", f"{words} words announced, {len(data)} octets came", errno.EMSGSIZE)
        extensions = self._decode_extensions(Reader(data[HEADER_LENGTH:], "sadb_ext", self.dialect))
        return Message(self.dialect.messages.of(kind), self.dialect.sa_types.of(sa_type), number, sequence, pid, extensions)

    def _decode_extensions(self, reader: Reader) -> tuple[Extension, ...]:
        extensions: list[Extension] = []
        seen: set[int] = set()
        while reader.remaining:
            words, number = reader.take(_EXTENSION)
            if number == ExtensionType.RESERVED:
                raise PfKeyError("sadb_ext_type", "reserved")
            if words == 0:
                raise PfKeyError("sadb_ext_len", f"extension {number} of no length")
            if len(extensions) == MAX_EXTENSIONS:
                raise PfKeyError("sadb_ext", f"more than {MAX_EXTENSIONS} extensions")
            count = words * WORD - EXTENSION_HEADER_LENGTH
            known = self._readers.get(number)
            if known is None:
                with reader.restrict_to(count, f"extension {number}"):
                    extensions.append(UnknownExtension(number, reader.octets(count)))
                continue
            kind, name, read = known
            if number in seen:
                raise PfKeyError(name, "comes twice")
            seen.add(number)
            with reader.restrict_to(count, name):
                extensions.append(read(reader, kind))
        return tuple(extensions)

    def encode(self, message: Message) -> bytes:
        """The octets of `message`. PfKeyError when a value does not fit, or the dialect has no such extension."""
        writer = Writer(self.dialect)
        kind, sa_type = self.dialect.messages.to(message.type, "sadb_msg_type"), self.dialect.sa_types.to(message.sa_type, "sadb_msg_satype")
        writer.put(_HEADER, PF_KEY_V2, kind, message.errno, sa_type, 0, 0, message.sequence, message.pid)
        for extension in message.extensions:
            self._encode_extension(writer, extension)
        writer.patch(_LENGTH_AT, _LENGTH, len(writer) // WORD)
        return writer.take()

    def _encode_extension(self, writer: Writer, extension: Extension) -> None:
        at = len(writer)
        if isinstance(extension, UnknownExtension):
            writer.put(_EXTENSION, 0, extension.number)
            writer.octets(extension.body)
        else:
            kind: ExtensionType = extension.type  # type: ignore[attr-defined]
            number = self._numbers.get(kind)
            if number is None:
                raise PfKeyError(kind.name, f"not known to {self.dialect.name}", errno.EOPNOTSUPP)
            writer.put(_EXTENSION, 0, number)
            _ALL_LAYOUTS[kind].write(writer, extension)
        length = len(writer) - at
        if length % WORD:
            raise PfKeyError("sadb_ext_len", f"extension of {length} octets")
        writer.patch(at, _LENGTH, length // WORD)


def header_of(data: bytes) -> Message:
    """What of the base header can be read, without extensions: for the answer to a message that `decode` refuses."""
    _, kind, number, sa_type, _, _, sequence, pid = _HEADER.unpack(data[:HEADER_LENGTH].ljust(HEADER_LENGTH, b"\0"))
    return Message(kind, sa_type, number, sequence, pid)
