"""Which child a reqid stands for. A reqid leads from a policy to its SAs, and from an ACQUIRE to its child."""

from __future__ import annotations

from kernel_shim.model import ReqId
from vpnd.config.model import ChildConfig, ConnectionConfig
from vpnd.daemon.entry import ChildKey
from vpnd.daemon.kernel_side import KernelSide


class ReqIds:
    """One for each child, from its first use on."""

    def __init__(self, kernel: KernelSide) -> None:
        self._kernel = kernel
        self._of_child: dict[ChildKey, ReqId] = {}
        self._children: dict[int, tuple[str, ChildConfig]] = {}

    def of(self, connection: ConnectionConfig, child: ChildConfig) -> int:
        """That of its configuration, or else one that was free when it was first asked for."""
        key = (connection.name, child.name)
        known = self._of_child.get(key)
        if child.reqid and known != child.reqid:
            known = self._of_child[key] = ReqId(child.reqid)
            self._kernel.reserve_reqid(known)
        elif known is None:
            known = self._of_child[key] = self._kernel.reqid_for(None)
        self._children[known] = (connection.name, child)
        return known

    def adopt(self, connection: ConnectionConfig, child: ChildConfig, reqid: ReqId) -> None:
        """Fix the reqid of a child before its first use: that of the policies which an earlier run left."""
        self._of_child.setdefault((connection.name, child.name), reqid)

    def child(self, reqid: int) -> tuple[str, ChildConfig] | None:
        """Connection name and child configuration."""
        return self._children.get(reqid)
