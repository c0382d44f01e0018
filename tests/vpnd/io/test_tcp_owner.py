"""Whose connections are."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

import pytest

from vpnd.io.tcp_owner import owner, place


@pytest.mark.parametrize(
    ("listening", "address", "client", "target"),
    [
        (socket.AF_INET, "127.0.0.1", socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET6, "::1", socket.AF_INET6, "::1"),
        (socket.AF_INET, "127.0.0.1", socket.AF_INET6, "::ffff:127.0.0.1"),
        (socket.AF_INET6, "::ffff:127.0.0.1", socket.AF_INET, "127.0.0.1"),
    ],
)
def test_the_other_end_is_ours_until_it_is_closed(listening: int, address: str, client: int, target: str) -> None:
    with socket.socket(listening) as server, socket.socket(client) as peer:
        server.bind((address, 0))
        server.listen()
        peer.connect((target, server.getsockname()[1]))
        accepted, name = server.accept()
        with accepted:
            theirs, ours = place(name), place(accepted.getsockname())
            assert owner(theirs, ours) == os.getuid()
            assert owner((theirs[0], theirs[1] ^ 1), ours) is None
            peer.close()
            assert owner(theirs, ours) is None


def test_a_scope_and_an_ipv4_address_within_an_ipv6_one_are_no_part_of_a_place() -> None:
    assert place(("::ffff:192.0.2.1", 80, 0, 0)) == (ip_address("192.0.2.1"), 80)
    assert place(("fe80::1%eth0", 80, 0, 3)) == (ip_address("fe80::1"), 80)
