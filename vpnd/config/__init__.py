"""Configuration: the grammar of swanctl.conf to the typed model, with file, line, column and dotted path in every complaint."""

from __future__ import annotations

from vpnd.config.errors import ConfigError, ConfigErrors, Position
from vpnd.config.loader import load, load_text
from vpnd.config.model import LoadedConfiguration

__all__ = ["ConfigError", "ConfigErrors", "LoadedConfiguration", "Position", "load", "load_text"]
