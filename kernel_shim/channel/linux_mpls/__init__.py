"""Label entries in Linux's own MPLS (net/mpls/af_mpls.c, mpls_iptunnel.c): devices, the filter at their ingress, routes, and the node of them all."""
