"""MIGRATE: policies and their SAs move to other outer addresses, all that share addresses, mode and reqid at once.

The kernel clones each SA and only then deletes the old one (net/xfrm/xfrm_policy.c, xfrm_migrate): what leaves between the two
uses sequence numbers that the clone uses again. So this is heard of and understood, and `XfrmChannel.migrate_sa` goes another way.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from kernel_shim.model import PROTOCOL_ESP, Direction, IPAddress, KernelError, Mode, Selector
from kernel_shim.xfrm.constants import MAX_MOVES, Attribute, MessageType, NetlinkFlag
from kernel_shim.xfrm.modes import mode_from, mode_number
from kernel_shim.xfrm.policies import direction_from, direction_number
from kernel_shim.xfrm.selectors import selector_attributes, selector_from, selector_struct
from kernel_shim.xfrm.structs import MOVE, MalformedMessage, MoveStruct, PolicyIdStruct, family_of, pack_address, unpack_address
from kernel_shim.xfrm.wire import Message


@dataclass(frozen=True, slots=True)
class Move:
    """From one pair of outer addresses to another."""

    old_source: IPAddress
    old_destination: IPAddress
    new_source: IPAddress
    new_destination: IPAddress
    mode: Mode
    reqid: int  # the kernel's own
    protocol: int = PROTOCOL_ESP


@dataclass(frozen=True, slots=True)
class Migration:
    """A policy, and where its templates and SAs go. `direction` None: of a single socket's policy."""

    direction: Direction | None
    selector: Selector
    moves: tuple[Move, ...]


def migrate_message(direction: Direction, selector: Selector, moves: Sequence[Move]) -> Message:
    """KernelError(EINVAL) for a selector that Linux cannot express, or a number of moves that it does not take."""
    if not 1 <= len(moves) <= MAX_MOVES:
        raise KernelError(errno.EINVAL, f"{len(moves)} moves; a MIGRATE has 1 to {MAX_MOVES}")
    body = PolicyIdStruct(selector_struct(selector), 0, direction_number(direction))
    attributes = selector_attributes(selector)
    attributes[Attribute.MIGRATE] = b"".join(_move_struct(move).pack() for move in moves)
    return Message(MessageType.MIGRATE, body.pack(), attributes, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def migration_from(message: Message) -> Migration:
    told = PolicyIdStruct.unpack(message.body)
    data = message.require(Attribute.MIGRATE)
    if not data or len(data) % MOVE.size or len(data) > MAX_MOVES * MOVE.size:
        raise MalformedMessage(f"moves of {len(data)} octets")
    moves = tuple(_move(MoveStruct.unpack(data, at)) for at in range(0, len(data), MOVE.size))
    return Migration(direction_from(told.dir), selector_from(told.selector, message.attributes), moves)


def _move_struct(move: Move) -> MoveStruct:
    return MoveStruct(
        pack_address(move.old_destination),
        pack_address(move.old_source),
        pack_address(move.new_destination),
        pack_address(move.new_source),
        move.protocol,
        mode_number(move.mode),
        move.reqid,
        family_of(move.old_destination.version),
        family_of(move.new_destination.version),
    )


def _move(struct: MoveStruct) -> Move:
    return Move(
        old_source=unpack_address(struct.old_saddr, struct.old_family),
        old_destination=unpack_address(struct.old_daddr, struct.old_family),
        new_source=unpack_address(struct.new_saddr, struct.new_family),
        new_destination=unpack_address(struct.new_daddr, struct.new_family),
        mode=mode_from(struct.mode),
        reqid=struct.reqid,
        protocol=struct.proto,
    )
