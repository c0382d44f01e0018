"""IKEv2 messages on the wire (RFC 7296 section 3): bounded decoding, exact encoding, no meaning."""

from __future__ import annotations
