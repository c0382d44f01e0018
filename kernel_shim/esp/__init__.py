"""ESP (RFC 4303): sealing and opening, one packet at a time and in rows."""
