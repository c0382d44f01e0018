"""VICI, strongSwan's control protocol (src/libcharon/plugins/vici/README.md): codec, formats, commands, server."""
