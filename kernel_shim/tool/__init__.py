"""`kernel-shim sad|spd|pending|bundles|labels|stats|monitor`: look at a kernel, as a person or as a program."""
