"""`make bench`: figures of our gateway, beside strongSwan's in the same run where it has the like.

Each module of `bench.__main__.GROUPS` has `run()`, a list of `Row`s or of mappings as `Row.as_json` gives them.
"""
