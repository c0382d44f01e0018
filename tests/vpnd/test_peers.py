from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_shim.model import Endpoint
from vpnd.config.model import ConnectionConfig
from vpnd.peers import BY_ANY, EXACT, NOT, WITHIN, Connections, candidates, host_names, match


@pytest.mark.parametrize(
    ("patterns", "address", "quality"),
    [
        (("%any",), "192.0.2.1", BY_ANY),
        (("%any4",), "2001:db8::1", NOT),
        (("0.0.0.0/0",), "192.0.2.1", BY_ANY),
        (("::",), "192.0.2.1", NOT),
        (("192.0.2.1",), "192.0.2.1", EXACT),
        (("192.0.2.2",), "192.0.2.1", NOT),
        (("192.0.2.0/24", "%any"), "192.0.2.1", WITHIN),
        (("192.0.2.1-192.0.2.9",), "192.0.2.9", WITHIN),
        (("192.0.2.1-192.0.2.9",), "192.0.2.10", NOT),
        (("gateway.example",), "192.0.2.7", EXACT),
        (("other.example",), "192.0.2.7", NOT),
    ],
)
def test_address_patterns(patterns: tuple[str, ...], address: str, quality: int) -> None:
    assert match(patterns, ip_address(address), {"gateway.example": ip_address("192.0.2.7")}) == quality


def test_only_names_are_left_to_the_resolver() -> None:
    assert host_names(["%any", "192.0.2.1", "192.0.2.0/24", "192.0.2.1-192.0.2.3", "gateway.example"]) == ["gateway.example"]


PATTERNS = st.sampled_from(["%any", "192.0.2.1", "192.0.2.2", "192.0.2.0/24", "192.0.2.1-192.0.2.2", "gateway.example", "2001:db8::1"])
ADDRESSES = [ip_address(text) for text in ("192.0.2.1", "192.0.2.2", "192.0.2.3", "198.51.100.1", "2001:db8::1")]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.one_of(st.none(), st.lists(PATTERNS, min_size=1, max_size=3)))))
def test_the_index_of_connections_finds_what_a_walk_finds(changes: list[tuple[str, list[str] | None]]) -> None:
    table = Connections()
    naive: dict[str, ConnectionConfig] = {}
    for name, patterns in changes:
        if patterns is None:
            assert (table.pop(name, None) is None) == (naive.pop(name, None) is None)
        else:
            table[name] = naive[name] = ConnectionConfig(name, (), (), (), {}, remote_addrs=tuple(patterns))
    assert dict(table) == naive
    resolved = {"gateway.example": ip_address("198.51.100.1")}
    local = Endpoint(ip_address("192.0.2.9"), 500)
    for address in ADDRESSES:
        remote = Endpoint(address, 500)
        assert table.candidates(local, remote, resolved) == candidates(naive.values(), local, remote, resolved)
