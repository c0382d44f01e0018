"""NETLINK_XFRM: the messages of Linux's own IPsec, encoded and decoded (linux/xfrm.h, net/xfrm/xfrm_user.c). Nothing here does I/O."""
