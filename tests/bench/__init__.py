"""`make bench`: figures of our gateway, beside strongSwan's in the same run where it has the like.

Each module of `bench.__main__.GROUPS` has `run() -> list[Row]`.
"""
