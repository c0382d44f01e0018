"""What a configuration asks beyond what a kernel can do. Nothing is weakened silently: it is said, with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kernel_shim.channel.linux import AF_KEY, XFRM
from kernel_shim.channel.userspace import USERSPACE
from kernel_shim.model import DEFAULT_COPIES, NO_MARK, Action, Capabilities
from vpnd.config.errors import ConfigError, Position
from vpnd.config.linux_labels import beyond_linux
from vpnd.config.model import ChildConfig, Configuration, ConnectionConfig, KernelChoice, TsTemplate
from vpnd.config.tree import Section
from vpnd.ike.iana import TransformType
from vpnd.ike.proposal import Proposal, within

EXPECTED: Final[Mapping[KernelChoice, Capabilities]] = {
    KernelChoice.USERSPACE: USERSPACE,
    KernelChoice.XFRM: XFRM,
    KernelChoice.PFKEY: AF_KEY,
}
"""What `vpnd check` measures against where the kernel is named. A running daemon asks its kernel, whose answer counts."""


def beyond(configuration: Configuration, capabilities: Capabilities, tree: Section | None = None) -> Sequence[ConfigError]:
    """One complaint for each thing that the kernel cannot do; `tree` is where places are looked up."""
    root = tree or Section()
    return [
        *beyond_labels(configuration, capabilities, root),
        *(
            ConfigError(f"the kernel '{capabilities.name}' {what}", path=path, position=_position(root, path))
            for connection in configuration.connections.values()
            for path, what in _connection(connection, f"connections.{connection.name}", capabilities)
        ),
    ]


def beyond_labels(configuration: Configuration, capabilities: Capabilities, tree: Section | None = None) -> Sequence[ConfigError]:
    """Complaints of what is configured of labels and the kernel cannot do: without it, it forwards none of them."""
    found = []
    if configuration.mpls and not capabilities.labels:
        found = [("mpls", "forwards no labels")]
    elif not capabilities.labels_in_full:
        found = [(f"mpls.{option}", what) for option, what in beyond_linux(configuration.mpls)]
    root = tree or Section()
    return [ConfigError(f"the kernel '{capabilities.name}' {what}", path=path, position=_position(root, path)) for path, what in found]


def _connection(connection: ConnectionConfig, path: str, capabilities: Capabilities) -> Iterator[tuple[str, str]]:
    if connection.encap is False and capabilities.encapsulation_required:
        yield f"{path}.encap", "carries ESP only in UDP"
    for child in connection.children.values():
        yield from _child(child, f"{path}.children.{child.name}", capabilities)


def refused(configuration: Configuration, capabilities: Capabilities, tree: Section) -> Sequence[ConfigError]:
    """One complaint for each thing without which a daemon on that kernel does not load a child, or the labels."""
    return [
        *beyond_labels(configuration, capabilities, tree),
        *(
            ConfigError(f"the kernel '{capabilities.name}' {what}", path=path, position=_position(tree, path))
            for connection in configuration.connections.values()
            for child in connection.children.values()
            for option, what in impossible(child, capabilities)
            for path in (f"connections.{connection.name}.children.{child.name}.{option}",)
        ),
    ]


def _child(child: ChildConfig, path: str, capabilities: Capabilities) -> Iterator[tuple[str, str]]:
    if not capabilities.address_ranges or not capabilities.port_ranges:
        for side, selectors in (("local_ts", child.local_ts), ("remote_ts", child.remote_ts)):
            yield from ((f"{path}.{side}", what) for selector in selectors for what in _selector(selector, capabilities))
    yield from ((f"{path}.{option}", what) for option, what in impossible(child, capabilities) if option != "esp_proposals")
    if child.action is Action.PROTECT:
        for proposal in child.esp_proposals:
            if text := _refused(proposal, capabilities):
                yield f"{path}.esp_proposals", text


def impossible(child: ChildConfig, capabilities: Capabilities) -> Iterator[tuple[str, str]]:
    """Option and why, for each without which the child would be another one than was asked for: a daemon does not load it."""
    for option in ("mark_in", "mark_out", "set_mark_in", "set_mark_out", "if_id_in", "if_id_out"):
        wanted = getattr(child, option)
        if wanted and wanted != NO_MARK and not (capabilities.if_ids if option.startswith("if_id") else capabilities.marks):
            yield option, f"has no {'interface ids' if option.startswith('if_id') else 'marks'} in its policies and SAs"
    if child.action is not Action.PROTECT:
        return
    if child.reqid > capabilities.maximum_reqid:
        yield "reqid", f"has reqids of at most {capabilities.maximum_reqid}"
    if not within(child.esp_proposals, capabilities):
        yield "esp_proposals", "has none of its ESP algorithms"
    if child.mode not in capabilities.modes:
        yield "mode", f"has no {child.mode.name.lower()} mode"
    if child.replay_window > capabilities.maximum_replay_window:
        yield "replay_window", f"has replay windows of at most {capabilities.maximum_replay_window}"
    if child.tfc_padding and not capabilities.tfc_padding:
        yield "tfc_padding", "has no TFC padding"
    if not capabilities.header_copies:
        chosen = (
            ("copy_dscp", (child.copies.dscp_out, child.copies.dscp_in), (DEFAULT_COPIES.dscp_out, DEFAULT_COPIES.dscp_in)),
            ("copy_ecn", child.copies.ecn, DEFAULT_COPIES.ecn),
            ("copy_df", child.copies.df, DEFAULT_COPIES.df),
        )
        for option, value, default in chosen:
            if value != default:
                yield option, "copies what it copies between IP headers, for all SAs alike"
    if child.unresolved not in capabilities.unresolved_modes:
        yield "unresolved", f"does not know '{child.unresolved.value}' for packets without an SA"


def _refused(proposal: Proposal, capabilities: Capabilities) -> str | None:
    possible = within((proposal,), capabilities)
    if not possible:
        return f"can do nothing of the proposal {proposal}"
    for kind in (TransformType.ENCR, TransformType.INTEG, TransformType.ESN):
        left = {transform for each in possible for transform in each.of_type(kind)}
        if missing := [transform for transform in proposal.of_type(kind) if transform not in left]:
            return f"cannot do {Proposal(proposal.protocol, tuple(missing))} of a proposal"
    return None


def _selector(selector: TsTemplate, capabilities: Capabilities) -> Iterator[str]:
    if not capabilities.port_ranges and not selector.ports.any and selector.ports.low != selector.ports.high:
        yield "has no port ranges in its policies"
    if not capabilities.address_ranges and selector.addresses and len(list(selector.addresses.addresses.prefixes())) > 1:
        yield "has no address ranges in its policies, only prefixes"


def _position(root: Section, path: str) -> Position | None:
    """Of the option, or else of the innermost section on its way."""
    position = None
    section = root
    for name in path.split("."):
        node = section.entries.get(name)
        if node is None:
            break
        position = node.position
        if not isinstance(node, Section):
            break
        section = node
    return position
