"""How the messages of an IKE SA are protected and cut to their path, and how the protection is taken off again."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_shim.model import Endpoint
from vpnd.config.model import ConnectionConfig, Fragmentation
from vpnd.ike.context import IkeContext
from vpnd.ike.crypto.sk import open_chain
from vpnd.ike.effects import Send
from vpnd.ike.fragments import SMALLEST_PACKET, Inner, Outgoing, Reassembly, packet_limit, seal
from vpnd.ike.iana import Exchange
from vpnd.ike.session import Session
from vpnd.ike.window import Serving
from vpnd.ike.wire.errors import IntegrityFailure
from vpnd.ike.wire.header import Header, MessageId
from vpnd.ike.wire.message import Message, decode_payloads, plain_form, plain_message
from vpnd.ike.wire.payloads import Payload, SkfPayload


class Protection(Session):
    """The part of an IKE SA between messages and datagrams."""

    def __init__(self, context: IkeContext, connection: ConnectionConfig, local: Endpoint, remote: Endpoint, *, initiator: bool, now: float) -> None:
        super().__init__(context, connection, local, remote, initiator=initiator, now=now)
        self._sent_at = now

    def _open(self, datagram: bytes, message: Message, fragments: Reassembly) -> Message | None:
        """None for what is not protected by our keys, and while fragments are missing. Raises MalformedMessage for what the peer itself got wrong."""
        sealed = message.encrypted
        if self.crypto is None or sealed is None:
            return None
        if isinstance(sealed, SkfPayload) and not (self.fragmentation and fragments.wants(message.header.message_id, sealed)):
            return None
        try:
            chain = open_chain(datagram, sealed, self.crypto.receive)
        except IntegrityFailure:
            return None
        if isinstance(sealed, SkfPayload):
            authenticated = self.established_at is not None
            inner = fragments.add(message.header.message_id, sealed, chain, datagram, authenticated=authenticated, now=self.now)
            if inner is None:
                return None
        else:
            fragments.clear()
            inner = Inner(sealed.first, chain)
        # RFC 9242 section 3.3.2
        intermediate = message.header.exchange == Exchange.IKE_INTERMEDIATE
        plain = plain_form(fragments.first_datagram or datagram, inner.first, inner.chain) if intermediate else b""
        return Message(message.header, decode_payloads(inner.first, inner.chain), plain)

    def _seal(self, exchange: int, message_id: int, payloads: Sequence[Payload], *, response: bool, serving: Serving | None = None) -> Outgoing:
        header = Header(self.wire_spi_i, self.wire_spi_r, exchange, MessageId(message_id), initiator=self.initiator, response=response)
        limit = self._limit(serving.local, serving.remote, piece=serving.piece) if serving else self._limit(self.local, self.remote)
        if exchange == Exchange.IKE_INTERMEDIATE:
            self.intermediate.cover(self.keys.suite.prf, self.keys.keys, plain_message(header, payloads), response=response)
        return seal(header, payloads, self.keys.send, self.context.entropy, limit)

    def _limit(self, local: Endpoint, remote: Endpoint, *, narrow: bool = False, piece: int = 0) -> int:
        """The octets of IKE message that a datagram may have; 0: any number.

        `narrow`: as few as every path carries. `piece`: the length of a fragment of the request that is being answered; the path back is taken to be like it.
        """
        if not self.fragmentation or self.connection.fragmentation is Fragmentation.ACCEPT:
            return 0
        smallest = SMALLEST_PACKET[local.address.version]
        packet = smallest if narrow else self.context.settings.fragment_size or smallest
        known = self.context.path_mtu(local.address, remote.address)
        limit = packet_limit(local, max(min(packet, known), smallest) if known else packet)
        return max(min(limit, piece), packet_limit(local, smallest)) if piece else limit

    def _count(self, exchange: int, *, incoming: bool, response: bool) -> None:
        self.context.exchanged(self.connection.name, exchange, incoming=incoming, response=response)

    def _send(self, message: Outgoing, local: Endpoint, remote: Endpoint) -> None:
        self._sent_at = self.now
        for datagram in message.datagrams:
            self.emit(Send(local, remote, datagram))
