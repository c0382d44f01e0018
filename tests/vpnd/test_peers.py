from ipaddress import ip_address

import pytest

from vpnd.peers import BY_ANY, EXACT, NOT, WITHIN, host_names, match


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
