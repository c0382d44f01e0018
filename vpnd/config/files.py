"""A configuration file to the messages that `swanctl --load-all` would send for it, in swanctl's order.

As with swanctl, credentials lie beside the file: `x509/` and `x509ca/` for certificates, `private/`, `rsa/`, `ecdsa/` and
`pkcs8/` for keys. A relative name in `certs` or `cacerts` is one in these directories.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization

from vpnd.config import options
from vpnd.config.credentials import PassphraseNeeded, decode_secret, load_private_key, read_credential_file
from vpnd.config.errors import ConfigError, Position
from vpnd.config.grammar import Parsed
from vpnd.config.reader import Reader, shown, split, suggestion
from vpnd.config.tree import Items, Node, Scalar, Section

MAX_CREDENTIAL_FILES: Final = 10_000  # in one directory

_LISTS: Final = (
    "local_addrs",
    "remote_addrs",
    "proposals",
    "esp_proposals",
    "ah_proposals",
    "local_ts",
    "remote_ts",
    "vips",
    "pools",
    "groups",
    "cert_policy",
)
_FILE_LISTS: Final = {"certs": "x509", "cacerts": "x509ca", "pubkeys": "pubkey"}  # option: directory
_CERTIFICATE_DIRECTORIES: Final = {"x509": "NONE", "x509ca": "CA"}  # directory: flag
_DIRECTORIES_TO_COME: Final = ("x509ocsp", "x509aa", "x509ac", "x509crl", "pubkey", "pkcs12")
_SHARED: Final = ("ike", "ppk")
_KEY_DIRECTORIES: Final = {"private": "any", "rsa": "rsa", "ecdsa": "ecdsa", "pkcs8": "any"}  # directory: type
_SECTIONS: Final = ("connections", "secrets", "pools", "authorities", "mpls", "vpnd")


@dataclass(slots=True)
class Messages:
    """What the file says, as messages of the control protocol. `origins` of certificates and keys are their files."""

    connections: list[Section] = field(default_factory=list)
    shared: list[Section] = field(default_factory=list)
    keys: list[tuple[Path, Section]] = field(default_factory=list)
    certificates: list[tuple[Path, Section]] = field(default_factory=list)
    daemon: Section = field(default_factory=Section)
    mpls: Section = field(default_factory=Section)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Passphrase:
    directory: str
    file: str
    secret: bytes = field(repr=False)
    position: Position | None


def messages_of(parsed: Parsed, directory: Path, errors: list[ConfigError]) -> Messages:
    """Complaints go to `errors`. `directory` is the configuration file's."""
    messages = Messages()
    root = parsed.root
    for name, node in root.entries.items():
        if isinstance(node, Section) and (name in _SECTIONS or name in parsed.referenced):
            continue
        what = "section" if isinstance(node, Section) else "option"
        hint = suggestion(name, _SECTIONS)
        if isinstance(node, Section) and not hint:
            messages.warnings.append(f"{node.position}: {shown(name)}: nothing refers to this section")
        else:
            errors.append(ConfigError(f"unknown {what} '{shown(name)}'{hint}", path=shown(name), position=node.key_position))
    messages.daemon = root.section("vpnd") or Section()
    messages.mpls = root.section("mpls") or Section()
    passphrases = _secrets(root.section("secrets") or Section(), messages, errors)
    _certificates(directory, messages, errors)
    _keys(directory, passphrases, messages, errors)
    for kind in ("pools", "authorities"):
        for name, section in (root.section(kind) or Section()).sections():
            errors.append(ConfigError(f"{kind} are not implemented yet", path=f"{kind}.{shown(name)}", position=section.position))
    for name, node in (root.section("connections") or Section()).entries.items():
        path = f"connections.{shown(name)}"
        if isinstance(node, Section):
            messages.connections.append(Section({name: _translate(node, path, directory, errors)}, node.key_position))
        else:
            errors.append(ConfigError("a section was expected", path=path, position=node.key_position))
    return messages


def _translate(section: Section, path: str, directory: Path, errors: list[ConfigError]) -> Section:
    translated = Section(key_position=section.key_position)
    for name, node in section.entries.items():
        if isinstance(node, Section):
            translated.entries[name] = _translate(node, f"{path}.{shown(name)}", directory, errors)
        elif isinstance(node, Scalar) and name in _LISTS:
            translated.entries[name] = Items(tuple(split(node)), node.key_position)
        elif isinstance(node, Scalar) and name in _FILE_LISTS:
            translated.entries[name] = Items(tuple(_files(node, name, path, directory, errors)), node.key_position)
        else:
            translated.entries[name] = node
    return translated


def _files(node: Scalar, option: str, path: str, directory: Path, errors: list[ConfigError]) -> Iterator[Scalar]:
    for item in split(node):
        try:
            inline = item.text[:2].lower() in ("0x", "0s")
            data = decode_secret(item.text) if inline else read_credential_file(_absolute(directory / _FILE_LISTS[option], item.text))
        except ValueError as error:
            errors.append(ConfigError(str(error), path=f"{path}.{option}", position=node.position))
            continue
        yield Scalar(data, node.position, node.key_position)


def _absolute(directory: Path, name: str) -> Path:
    if "\0" in name:
        raise ValueError("a file name with a NUL")
    return (directory / name).absolute()


# Secrets


def _secrets(secrets: Section, messages: Messages, errors: list[ConfigError]) -> list[_Passphrase]:
    passphrases: list[_Passphrase] = []
    for name, node in secrets.entries.items():
        path = f"secrets.{shown(name)}"
        prefix = next((prefix for prefix in (*options.SECRETS, *_SHARED, *_KEY_DIRECTORIES) if name.startswith(prefix)), None)
        if not isinstance(node, Section):
            errors.append(ConfigError("a section was expected", path=path, position=node.key_position))
        elif prefix is None:
            hint = suggestion(name, [*_SHARED, *_KEY_DIRECTORIES])
            errors.append(ConfigError(f"a section of secrets begins with its kind, such as 'ike'{hint}", path=path, position=node.key_position))
        elif prefix in options.SECRETS:
            errors.append(ConfigError(f"secrets of type '{prefix}' are not implemented yet", path=path, position=node.key_position))
        elif prefix in _SHARED:
            _shared(name, prefix, Reader(node, path, errors), messages)
        else:
            passphrases += _passphrases(prefix, Reader(node, path, errors))
    return passphrases


def _shared(name: str, kind: str, reader: Reader, messages: Messages) -> None:
    secret = reader.convert("secret", None, decode_secret)
    if "secret" not in reader.section.entries:
        reader.complain("the option 'secret' is missing")
    elif secret == b"":
        reader.complain("the secret is empty", "secret")
    owners = []
    for option, node in reader.section.entries.items():
        if option.startswith("id") and isinstance(node, Scalar):
            reader.mark_read(option)
            owners.append(node)
    reader.finish(["id"])
    if secret:
        position = reader.section.key_position
        entries: dict[str, Node] = {
            "id": Scalar(name.encode(), position, position),
            "type": Scalar(kind.encode(), position, position),
            "data": Scalar(secret, reader.position("secret"), position),
            "owners": Items(tuple(owners), position),
        }
        messages.shared.append(Section(entries, position))


def _passphrases(directory: str, reader: Reader) -> list[_Passphrase]:
    file = reader.text("file", "")
    if not file:
        reader.complain("the option 'file' is missing")
    found = []
    for option, node in reader.section.entries.items():
        if option.startswith("secret") and isinstance(node, Scalar):
            reader.mark_read(option)
            found.append(_Passphrase(directory, file.lower(), node.value, reader.position("file")))
    if not found:
        reader.complain("the option 'secret' is missing")
    reader.finish(["secret"])
    return found


# Credential files


def _listing(directory: Path, errors: list[ConfigError]) -> list[Path]:
    """Regular files, by name; a directory that is not there is empty."""
    try:
        found = sorted(path for path in directory.iterdir() if path.is_file())
    except FileNotFoundError:
        return []
    except OSError as error:
        errors.append(ConfigError(f"cannot read {directory}: {error.strerror}", path=directory.name))
        return []
    if len(found) > MAX_CREDENTIAL_FILES:
        errors.append(ConfigError(f"more than {MAX_CREDENTIAL_FILES} files in {directory}", path=directory.name))
        return []
    return found


def _certificates(directory: Path, messages: Messages, errors: list[ConfigError]) -> None:
    for name, flag in _CERTIFICATE_DIRECTORIES.items():
        for path in _listing(directory / name, errors):
            try:
                data = read_credential_file(path.absolute())
            except ValueError as error:
                errors.append(ConfigError(str(error), path=name))
                continue
            messages.certificates.append((path, Section.of({"type": "X509", "flag": flag, "data": data})))
    for name in _DIRECTORIES_TO_COME:
        for path in _listing(directory / name, errors):
            errors.append(ConfigError(f"{path}: credentials in {name}/ are not implemented yet", path=name))


def _keys(directory: Path, passphrases: list[_Passphrase], messages: Messages, errors: list[ConfigError]) -> None:
    for name, kind in _KEY_DIRECTORIES.items():
        listing = _listing(directory / name, errors)
        there = {path.name.lower() for path in listing}
        for each in passphrases:
            if each.directory == name and each.file and each.file not in there:
                errors.append(ConfigError(f"there is no file '{shown(each.file)}' in {name}/", path="secrets", position=each.position))
        for path in listing:
            secrets = [each.secret for each in passphrases if each.directory == name and each.file == path.name.lower()]
            try:
                data = _decrypted(read_credential_file(path.absolute()), secrets)
            except ValueError as error:
                errors.append(ConfigError(f"{path}: {error}", path=name))
                continue
            messages.keys.append((path, Section.of({"type": kind, "data": data})))


def _decrypted(data: bytes, passphrases: list[bytes]) -> bytes:
    """The key as it is, or, as swanctl does, as DER without encryption."""
    try:
        load_private_key(data)
        return data
    except PassphraseNeeded:
        if not passphrases:
            raise
    for passphrase in passphrases:
        try:
            key = load_private_key(data, passphrase)
        except ValueError:
            continue
        return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    raise ValueError("no configured passphrase opens the private key")
