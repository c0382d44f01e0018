"""IKE addresses and traffic selectors in the words of swanctl.conf."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from kernel_shim.model import (
    ANY_PORT,
    ANY_PROTOCOL,
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    AddressRange,
    PortRange,
    TrafficSelector,
)
from vpnd.config.model import TsTemplate
from vpnd.config.reader import integer, shown

MAX_HOST_NAME: Final = 253  # RFC 1035 section 2.3.4, as text

_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
ANY_ADDRESS: Final = {"%any": None, "%any4": 4, "%any6": 6, "0.0.0.0": 4, "::": 6}  # noqa: S104
PROTOCOLS: Final = {  # /etc/protocols, protocols(5)
    "any": 0,
    "icmp": 1,
    "igmp": 2,
    "ipencap": 4,
    "tcp": 6,
    "udp": 17,
    "dccp": 33,
    "ipv6": 41,
    "rsvp": 46,
    "gre": 47,
    "esp": 50,
    "ah": 51,
    "ipv6-icmp": 58,
    "icmpv6": 58,
    "eigrp": 88,
    "ospf": 89,
    "pim": 103,
    "vrrp": 112,
    "l2tp": 115,
    "sctp": 132,
    "udplite": 136,
}
PROTOCOL_NAMES: Final = {number: name for name, number in reversed(PROTOCOLS.items())}  # of two names the first
_PORTS: Final = {  # /etc/services, those that tunnels are restricted to
    "ftp": 21,
    "ssh": 22,
    "telnet": 23,
    "smtp": 25,
    "domain": 53,
    "bootps": 67,
    "bootpc": 68,
    "tftp": 69,
    "http": 80,
    "kerberos": 88,
    "ntp": 123,
    "imap2": 143,
    "snmp": 161,
    "bgp": 179,
    "ldap": 389,
    "https": 443,
    "isakmp": 500,
    "syslog": 514,
    "ldaps": 636,
    "l2f": 1701,
    "l2tp": 1701,
    "radius": 1812,
    "nfs": 2049,
    "mysql": 3306,
    "ipsec-nat-t": 4500,
    "postgresql": 5432,
}
PORT_NAMES: Final = {number: name for name, number in reversed(_PORTS.items())}


def parse_ike_address(text: str) -> str:
    """An entry of `local_addrs` in one spelling: %any, %any4, %any6, an address, a prefix or a range. Raises ValueError."""
    if text in ANY_ADDRESS:
        version = ANY_ADDRESS[text]
        return "%any" if version is None else f"%any{version}"
    try:
        if "/" in text:
            return str(ip_network(text, strict=False))
        if "-" in text:
            covered = _range(text)
            return f"{covered.first}-{covered.last}"
        return str(ip_address(text))
    except ValueError:
        raise ValueError(f"'{shown(text)}' is not an address, prefix or range") from None


def parse_remote_address(text: str) -> str:
    """An entry of `remote_addrs`: the same, or a host's name. Raises ValueError."""
    try:
        return parse_ike_address(text)
    except ValueError:
        name = text.removesuffix(".").lower()
        labels = name.split(".")
        if len(name) > MAX_HOST_NAME or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdecimal():
            raise ValueError(f"'{shown(text)}' is not an address, prefix, range or host name") from None
        return name


def parse_traffic_selector(text: str) -> TsTemplate:
    """`10.1.0.0/16`, `10.1.0.1-10.1.0.9[tcp/80-90]`, `dynamic[udp]`, `::/0[ipv6-icmp/128]`. Raises ValueError."""
    address, protocol, ports = text, ANY_PROTOCOL, ANY_PORT
    if "[" in text:
        address, _, inside = text.partition("[")
        inside, bracket, rest = inside.rpartition("]")
        if not bracket or rest:
            raise ValueError(f"'{shown(text)}' has no closing ']' at its end")
        protocol, ports = _protocol_and_ports(inside)
    address = address.strip()
    if address == "dynamic":
        return TsTemplate(None, protocol, ports)
    try:
        covered = _range(address) if "-" in address else AddressRange.of(ip_network(address, strict=False))
    except ValueError:
        raise ValueError(f"'{shown(address)}' is not a prefix, an address range or 'dynamic'") from None
    return TsTemplate(TrafficSelector(covered, protocol, ports), protocol, ports)


def _range(text: str) -> AddressRange:
    first, _, last = text.partition("-")
    return AddressRange(_address(first), _address(last))


def _address(text: str) -> IPv4Address | IPv6Address:
    return ip_address(text.strip())


def _protocol_and_ports(text: str) -> tuple[int, PortRange]:
    name, _, ports = text.partition("/")
    name = name.strip().lower()
    protocol = PROTOCOLS[name] if name in PROTOCOLS else integer(name, 0, 255) if name else ANY_PROTOCOL
    ports = ports.strip().lower()
    if ports in ("", "any"):
        return protocol, ANY_PORT
    if ports == "opaque":
        raise ValueError("'opaque' ports are not implemented yet")
    low, dash, high = ports.partition("-")
    first = _port(low)
    last = _port(high) if dash else first
    if protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6):
        # swanctl.conf(5): below 256 it is a type, with any code; else type << 8 | code.
        if first < 256:
            first <<= 8
        if last < 256:
            last = last << 8 | 0xFF
    if last < first:
        raise ValueError(f"the port range {shown(ports)} ends before it begins")
    return protocol, PortRange(first, last)


def _port(text: str) -> int:
    text = text.strip()
    return _PORTS[text] if text in _PORTS else integer(text, 0, 65535)
