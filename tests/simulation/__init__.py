"""Whole gateways in one process on a virtual clock: key managers, channels, kernels, hosts and the network between them."""
