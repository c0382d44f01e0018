"""`kernel-shim sad|spd|pending|bundles|stats|monitor`: look at a kernel, as a person or as a program."""
