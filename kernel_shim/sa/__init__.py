"""Security associations: the SAD, sequence numbers, replay windows, lifetimes."""
