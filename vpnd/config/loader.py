"""A configuration file to everything that it says, typed."""

from __future__ import annotations

from pathlib import Path

from vpnd.config.credentials import validate_certificate, validate_key, validate_shared
from vpnd.config.daemon import validate_daemon
from vpnd.config.errors import ConfigError, ConfigErrors
from vpnd.config.files import messages_of
from vpnd.config.grammar import Parsed, parse_file, parse_text
from vpnd.config.model import Configuration, ConnectionConfig, LoadedConfiguration, PrivateKeySource, SharedSecret
from vpnd.config.mpls import validate_mpls
from vpnd.config.tree import Section
from vpnd.config.validate import validate_connection


def load(path: Path) -> LoadedConfiguration:
    """Read a file, what it includes, and the credentials beside it. Raises ConfigErrors with everything that is wrong."""
    try:
        parsed = parse_file(path)
    except ConfigError as error:
        raise ConfigErrors([error]) from error
    return _load(parsed, path.parent)


def load_text(text: str, directory: Path, name: str = "<text>") -> LoadedConfiguration:
    """The same for a text, as if it were a file in `directory`."""
    try:
        parsed = parse_text(text, name)
    except ConfigError as error:
        raise ConfigErrors([error]) from error
    return _load(parsed, directory)


def _load(parsed: Parsed, directory: Path) -> LoadedConfiguration:
    errors: list[ConfigError] = []
    messages = messages_of(parsed, directory, errors)
    daemon = validate_daemon(messages.daemon, errors)
    connections: dict[str, ConnectionConfig] = {}
    for message in messages.connections:
        try:
            connection = validate_connection(message)
            connections[connection.name] = connection
        except ConfigErrors as invalid:
            errors += invalid.errors
    certificates: dict[bytes, None] = {}  # ordered sets
    authorities: dict[bytes, None] = {}
    for path, message in messages.certificates:
        try:
            der, authority = validate_certificate(message)
            (authorities if authority else certificates)[der] = None
        except ConfigErrors as invalid:
            errors += _in_file(path, invalid)
    keys: list[PrivateKeySource] = []
    for path, message in messages.keys:
        try:
            keys.append(validate_key(message))
        except ConfigErrors as invalid:
            errors += _in_file(path, invalid)
    shared = _shared(messages.shared, errors)
    mpls = validate_mpls(messages.mpls, errors)
    # As strongSwan: what a connection names is known to the whole daemon.
    for connection in connections.values():
        for each in (*connection.local, *connection.remote):
            certificates |= dict.fromkeys(each.certs)
            authorities |= dict.fromkeys(each.cacerts)
    if errors:
        raise ConfigErrors(sorted(errors, key=lambda error: (error.position is None, error.position or ())))
    configuration = Configuration(connections, shared, tuple(keys), tuple(certificates), tuple(authorities), mpls)
    return LoadedConfiguration(daemon, configuration, tuple(messages.warnings), parsed.root)


def _shared(messages: list[Section], errors: list[ConfigError]) -> dict[str, SharedSecret]:
    shared: dict[str, SharedSecret] = {}
    for message in messages:
        try:
            secret = validate_shared(message, f"secrets.{message.text('id')}")
            shared[secret.name] = secret
        except ConfigErrors as invalid:
            errors += invalid.errors
    return shared


def _in_file(path: Path, invalid: ConfigErrors) -> list[ConfigError]:
    return [ConfigError(f"{path}: {error.message}", path=error.path) for error in invalid.errors]
