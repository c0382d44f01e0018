"""Why the shim dropped a packet: the closed list that counters, logs, the control socket and the tests share.

The values are stable: they are names of counters outside this process.
"""

from __future__ import annotations

from enum import Enum


class DropReason(Enum):
    """One value for each place where a packet can end."""

    # What came is not a packet that can be looked up.
    NOT_IP = "not_ip"
    HEADER_TRUNCATED = "header_truncated"
    HEADER_INVALID = "header_invalid"
    EXTENSION_HEADERS_TOO_MANY = "extension_headers_too_many"
    FRAGMENT_WITHOUT_FIRST = "fragment_without_first"  # ports decide, and the fragment that carries them was not seen

    # What the SPD says.
    POLICY_DISCARD = "policy_discard"
    POLICY_ABSENT = "policy_absent"  # inside a tunnel, and no policy lets it in
    POLICY_MISMATCH = "policy_mismatch"  # protected, by another SA than its policy asks for
    CLEAR_WHERE_PROTECTED = "clear_where_protected"

    # A policy without a usable SA.
    UNRESOLVED_DROP = "unresolved_drop"  # the policy's mode is drop
    UNRESOLVED_EAGAIN = "unresolved_eagain"  # the policy's mode is eagain
    PENDING_OVERFLOW_PACKETS = "pending_overflow_packets"
    PENDING_OVERFLOW_BYTES = "pending_overflow_bytes"
    PENDING_OVERFLOW_GLOBAL = "pending_overflow_global"
    PENDING_TOO_LARGE = "pending_too_large"  # greater than a whole queue may be
    PENDING_AGED = "pending_aged"
    PENDING_POLICY_GONE = "pending_policy_gone"
    ACQUIRE_FAILED = "acquire_failed"
    ACQUIRE_TIMEOUT = "acquire_timeout"
    ACQUIRE_BACKOFF = "acquire_backoff"
    ACQUIRE_TABLE_FULL = "acquire_table_full"

    # Outbound, on the way into an SA.
    TOO_BIG = "too_big"  # over the path's MTU and not to be fragmented; the sender is told
    OFFLOAD_INVALID = "offload_invalid"  # a virtio_net_hdr that does not fit its packet
    TRANSPORT_FRAGMENT = "transport_fragment"  # transport mode takes whole datagrams (RFC 4303 section 3.1.1), and not all of this one came
    TTL_EXPIRED = "ttl_expired"  # from one tunnel into another
    SA_EXHAUSTED = "sa_exhausted"  # its SA reached a hard lifetime between the pieces of a packet

    # Inbound, on the way out of an SA.
    KEEPALIVE = "keepalive"  # RFC 3948 section 2.3
    ESP_MALFORMED = "esp_malformed"
    SA_UNKNOWN = "sa_unknown"
    LARVAL_OVERFLOW = "larval_overflow"
    LARVAL_GONE = "larval_gone"  # the larval SA that it waited for ended without keys
    REPLAYED = "replayed"
    ICV_MISMATCH = "icv_mismatch"
    DUMMY = "dummy"  # RFC 4303 section 2.6
    ECN_INVALID = "ecn_invalid"  # RFC 6040 section 4.2: congestion was marked on a packet that knows no ECN
    SELECTOR_MISMATCH = "selector_mismatch"  # the SA's own selectors do not cover it

    # Labelled packets.
    MPLS_NO_BOTTOM = "mpls_no_bottom"  # the packet ends before the bottom of its stack
    MPLS_TOO_DEEP = "mpls_too_deep"
    MPLS_SPECIAL_LABEL = "mpls_special_label"  # a special-purpose label that means nothing where it stands
    MPLS_LABEL_UNKNOWN = "mpls_label_unknown"
    MPLS_LABEL_FORBIDDEN = "mpls_label_forbidden"  # the peer that sent it may not use this label
    MPLS_PEER_UNKNOWN = "mpls_peer_unknown"  # from an SA whose peer may send no label
    MPLS_NOT_BOTTOM = "mpls_not_bottom"  # IP was to come to light, and there was another label
    MPLS_PAYLOAD = "mpls_payload"  # neither IPv4 nor IPv6, or not the one that the label says
    MPLS_TTL_EXPIRED = "mpls_ttl_expired"
    MPLS_TOO_BIG = "mpls_too_big"
    MPLS_NO_ROUTE = "mpls_no_route"  # the VRF has none to this destination
    MPLS_ENCAPSULATION = "mpls_encapsulation"  # a GRE or UDP header that holds no labels

    @property
    def text(self) -> str:
        """For a person: `policy discard`."""
        return self.value.replace("_", " ")
