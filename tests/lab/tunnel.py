"""What a tunnel between two sites shall be, as the swanctl.conf of either side; both daemons read the same grammar."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lab.certs import Authority, Credential, KeyKind
from lab.topology import Site, Sites

CONNECTION: Final = "site"
CHILD: Final = "net"
SECRET: Final = "a laboratory secret, known to all"
NAME_A: Final = "a.example"
NAME_B: Final = "b.example"
PPK_NAME: Final = "ppk.example"


class Side(enum.Enum):
    A = "a"
    B = "b"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What both sides authenticate with by certificate."""

    authority: Authority
    a: Credential
    b: Credential

    @classmethod
    def make(cls, a: KeyKind, b: KeyKind | None = None) -> Credentials:
        authority = Authority.make(KeyKind.ECDSA if KeyKind.ED25519 not in (a, b) else KeyKind.RSA)
        return cls(authority, authority.issue(NAME_A, a), authority.issue(NAME_B, b or a))


@dataclass(frozen=True, slots=True)
class Tunnel:
    """One connection with one child. `credentials` None is PSK. Traffic selectors empty: the site's networks (`dynamic` in transport mode).

    `connection_options` and `child_options` are further lines of the section, the same for both sides;
    `options_a` and `options_b` further child lines of one side. What ends in `_b` (`ts_b_at_b`: B's own `local_ts`) differs at B, where given.
    """

    proposals: str = "aes128gcm16-prfsha256-x25519"
    esp_proposals: str = "aes128gcm16"
    credentials: Credentials | None = None
    secret: str = SECRET
    mode: str = "tunnel"
    ts_a: str = ""
    ts_b: str = ""
    outer_version: int = 4
    inner_version: int = 4
    start_a: str = "none"
    start_b: str = "none"
    connection_options: Mapping[str, str] = field(default_factory=dict)
    child_options: Mapping[str, str] = field(default_factory=dict)
    options_a: Mapping[str, str] = field(default_factory=dict)
    options_b: Mapping[str, str] = field(default_factory=dict)
    proposals_b: str = ""
    esp_proposals_b: str = ""
    secret_b: str = ""
    credentials_b: Credentials | None = None
    ts_b_at_b: str = ""
    dpd_a: str = ""  # dpd_delay of A
    dpd_b: str = ""
    connection_a: Mapping[str, str] = field(default_factory=dict)  # further lines of one side's connection
    connection_b: Mapping[str, str] = field(default_factory=dict)
    ppk_a: str = ""  # a post-quantum pre-shared key for PPK_NAME
    ppk_b: str = ""
    ppk_name_b: str = PPK_NAME  # whom B has it for
    more_children: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name -> ts_a, ts_b; else like the first
    more_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # further lines of one of these children, on both sides

    def _selector(self, site: Site, given: str) -> str:
        if given:
            return given
        if self.mode == "transport":
            return "dynamic"
        return str(site.net4 if self.inner_version == 4 else site.net6)

    def _outer(self, site: Site) -> str:
        return str(site.wan4 if self.outer_version == 4 else site.wan6)

    def write(self, sites: Sites, side: Side, directory: Path) -> Path:
        """Write swanctl.conf and the folders x509, x509ca, private beside it, as swanctl lays them out. The path of swanctl.conf."""
        directory.mkdir(parents=True, exist_ok=True)
        near, far = (sites.a, sites.b) if side is Side.A else (sites.b, sites.a)
        near_name, far_name = (NAME_A, NAME_B) if side is Side.A else (NAME_B, NAME_A)
        near_ts, far_ts = self._selector(sites.a, self.ts_a), self._selector(sites.b, self.ts_b)
        proposals, secret, credentials = self.proposals, self.secret, self.credentials
        if side is Side.B:
            near_ts, far_ts = self.ts_b_at_b or far_ts, near_ts
            proposals, secret, credentials = self.proposals_b or proposals, self.secret_b or secret, self.credentials_b or credentials
        start, more, dpd = (self.start_a, self.options_a, self.dpd_a) if side is Side.A else (self.start_b, self.options_b, self.dpd_b)

        auth = "psk" if credentials is None else "pubkey"
        local = [f"auth = {auth}", f"id = {near_name}"]
        remote = [f"auth = {auth}", f"id = {far_name}"]
        secrets = ""
        if credentials is None:
            secrets = f'secrets {{\n  ike-lab {{\n    id-a = {NAME_A}\n    id-b = {NAME_B}\n    secret = "{secret}"\n  }}\n}}\n'
        else:
            own = credentials.a if side is Side.A else credentials.b
            for folder, name, data in (
                ("x509", "own.pem", own.certificate_pem),
                ("x509ca", "ca.pem", credentials.authority.credential.certificate_pem),
                ("private", "own.pem", own.key_pem),
            ):
                (directory / folder).mkdir(exist_ok=True)
                (directory / folder / name).write_bytes(data)
            local.append("certs = own.pem")
            remote.append("cacerts = ca.pem")
        ppk = self.ppk_a if side is Side.A else self.ppk_b
        if ppk:
            secrets += f'secrets {{\n  ppk-lab {{\n    id = {PPK_NAME if side is Side.A else self.ppk_name_b}\n    secret = "{ppk}"\n  }}\n}}\n'
        connection = {
            "version": "2",
            "local_addrs": self._outer(near),
            "remote_addrs": self._outer(far),
            "proposals": proposals,
            "encap": "yes",
            **({"dpd_delay": dpd} if dpd else {}),
            **self.connection_options,
            **(self.connection_a if side is Side.A else self.connection_b),
        }
        children = ""
        for name, ours, theirs in ((CHILD, near_ts, far_ts), *((name, *(ts if side is Side.A else ts[::-1])) for name, ts in self.more_children.items())):
            child = {
                "esp_proposals": (self.esp_proposals_b if side is Side.B else "") or self.esp_proposals,
                "mode": self.mode,
                "local_ts": ours,
                "remote_ts": theirs,
                "start_action": start,
                **self.child_options,
                **more,
                **self.more_options.get(name, {}),
            }
            children += f"      {name} {{\n" + "".join(f"        {option} = {value}\n" for option, value in child.items()) + "      }\n"
        path = directory / "swanctl.conf"
        path.write_text(
            "connections {\n"
            + f"  {CONNECTION} {{\n"
            + "".join(f"    {name} = {value}\n" for name, value in connection.items())
            + "    local {\n"
            + "".join(f"      {line}\n" for line in local)
            + "    }\n    remote {\n"
            + "".join(f"      {line}\n" for line in remote)
            + "    }\n    children {\n"
            + children
            + "    }\n  }\n}\n"
            + secrets
        )
        return path
