"""What outlives the daemon: small secrets in its state directory, readable by nobody else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from vpnd.ike.crypto import Entropy

FILE_MODE: Final = 0o600


def kept_secret(directory: Path, name: str, length: int, entropy: Entropy) -> bytes:
    """The secret of that name, made when there is none, or one of another length or that others can read. OSError when it can be neither read nor made."""
    path = directory / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    else:
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            data = stream.read(length + 1)
        if len(data) == length and status.st_mode & 0o077 == 0 and status.st_uid == os.geteuid():
            return data
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = entropy(length)
    fresh = directory / f".{name}.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(secret)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return secret
