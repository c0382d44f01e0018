"""A laboratory of network namespaces: hosts, gateways and the wire between them, real daemons, real packets.

Root is needed. Everything that a `Lab` makes carries the pid of its maker in its name, is taken away when the `Lab` ends,
and what a killed run left behind is taken away by the next one.
"""
