"""Who may import whom. `kernel_shim` knows nothing of `vpnd`, cores do no I/O, and nobody reaches into another's edge."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The edges: where sockets, files, timers and processes may be. Everything else is a core.
EDGES = (
    "kernel_shim.core_dumps",
    "kernel_shim.logs",
    "kernel_shim.nft",
    "kernel_shim.service",
    "kernel_shim.io",
    "kernel_shim.channel",
    "kernel_shim.tool",
    "vpnd.app",
    "vpnd.cli",
    "vpnd.control.client",
    "vpnd.control.server",
    "vpnd.daemon",
    "vpnd.io",
    "vpnd.telemetry",
)
# Whose io a module of each edge may use: the composition roots wire edges together.
MAY_USE_IO = {
    "kernel_shim.io": ("kernel_shim.io",),
    "vpnd.app": ("vpnd.io",),
    "vpnd.daemon": ("vpnd.io",),
    "vpnd.io": ("vpnd.io",),
    "vpnd.cli": ("vpnd.io",),
}

IMPURE_MODULES = frozenset(
    {
        *("asyncio", "concurrent", "multiprocessing", "subprocess", "threading"),
        *("asyncio_dgram", "fcntl", "pyroute2", "select", "selectors", "signal", "socket", "socketserver", "ssl", "tempfile", "uvloop"),
        *("random", "secrets", "time"),
    }
)
# Message classes that do no I/O, from packages that otherwise do.
PURE_PARTS = {"kernel_shim.xfrm": ("pyroute2.netlink",)}
IMPURE_NAMES = frozenset({"os.urandom", "os.getrandom", "datetime.now", "datetime.utcnow", "datetime.today", "date.today", "uuid.uuid4", "uuid.uuid1"})


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("kernel_shim", "vpnd"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def is_edge(module: str) -> bool:
    return any(within(module, edge) for edge in EDGES)


def _type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of `if TYPE_CHECKING:`, which never run."""
    for child in ast.iter_child_nodes(tree):
        if _type_checking_only(child):
            continue
        yield child
        yield from _walk(child)


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Dotted names that `module` imports, functions' own imports included, with the line."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                dotted = f"{base}.{alias.name}"
                yield dotted if dotted in MODULES else base, node.lineno


def impure_uses(module: str) -> Iterator[tuple[str, int]]:
    """Calls by attribute of what reads a clock or entropy."""
    for node in _walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and (dotted := ast.unparse(node)).split(".", 1)[-1] and ".".join(dotted.split(".")[-2:]) in IMPURE_NAMES:
            yield dotted, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if f"os.{alias.name}" in IMPURE_NAMES:
                    yield f"os.{alias.name}", node.lineno


def _where(module: str, line: int, what: str) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{line}: {what}"


def test_both_packages_are_read() -> None:
    assert {"kernel_shim.model", "vpnd.ike.identity"} <= set(MODULES)


@pytest.mark.parametrize("edge", EDGES)
def test_every_edge_exists(edge: str) -> None:
    assert any(within(module, edge) for module in MODULES), f"{edge} is gone; take it off the list"


def test_kernel_shim_never_imports_vpnd() -> None:
    assert [_where(m, line, name) for m in MODULES if within(m, "kernel_shim") for name, line in imports(m) if within(name, "vpnd")] == []


def test_vpnd_sees_a_kernel_only_through_the_channel_and_the_shared_words() -> None:
    allowed = (
        "kernel_shim.model",
        "kernel_shim.algorithms",
        "kernel_shim.secret",
        "kernel_shim.core_dumps",
        "kernel_shim.logs",
        "kernel_shim.service",
        "kernel_shim.reasons",
        "kernel_shim.mpls",
        "kernel_shim.channel",
    )
    wrong = [
        _where(m, line, name)
        for m in MODULES
        if within(m, "vpnd")
        for name, line in imports(m)
        if within(name, "kernel_shim") and not any(within(name, room) for room in allowed)
    ]
    assert wrong == []


def test_cores_do_no_io() -> None:
    wrong = [
        _where(m, line, f"imports {name}")
        for m in MODULES
        if not is_edge(m)
        for name, line in imports(m)
        if name.split(".")[0] in IMPURE_MODULES and not any(within(name, part) for part in PURE_PARTS.get(m.rpartition(".")[0], ()))
    ]
    wrong += [_where(m, line, f"uses {name}") for m in MODULES if not is_edge(m) for name, line in impure_uses(m)]
    assert wrong == []


def test_nobody_imports_anothers_edge() -> None:
    wrong = []
    for module in MODULES:
        allowed = next((rooms for edge, rooms in MAY_USE_IO.items() if within(module, edge)), ())
        for name, line in imports(module):
            if name.split(".")[0] in ("vpnd", "kernel_shim") and ".io." in f".{name}." and not any(within(name, room) for room in allowed):
                wrong.append(_where(module, line, f"imports {name}"))
    assert wrong == []
