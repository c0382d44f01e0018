"""`make demo`: the lab of the tests, shown to a person."""
