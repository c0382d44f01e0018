"""IP packets as bytes: headers, checksums, cutting, joining, and the ICMP errors about them."""
