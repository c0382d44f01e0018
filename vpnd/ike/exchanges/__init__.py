"""The exchanges of RFC 7296, one a file."""
