"""Starts the userspace kernel when none listens. It lives on when this process ends."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

START_TIMEOUT: Final = 20.0  # s, until the new shim says that it listens


class ShimStartError(RuntimeError):
    """The userspace kernel did not start; the text is for the user."""


def shim_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


async def start_shim(path: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start `kernel-shim serve` in a session of its own and wait until it listens on `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShimStartError(f"no place for the userspace kernel's socket: {path.parent}: {error.strerror}") from error
    read, write = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: ASYNC220  # fork and exec only; nothing is waited for
            [sys.executable, "-m", "kernel_shim.io.main", "serve", "--socket", str(path), "--ready-fd", str(write), *arguments],
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},  # its READY=1 is not ours
            start_new_session=True,
            pass_fds=(write,),
        )
    except OSError as error:
        os.close(read)
        raise ShimStartError(f"the userspace kernel cannot be started: {sys.executable}: {error.strerror}") from error
    finally:
        os.close(write)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(START_TIMEOUT):
            ready = await loop.run_in_executor(None, os.read, read, 1)
    except TimeoutError:
        process.kill()
        raise ShimStartError(f"the userspace kernel did not get ready within {START_TIMEOUT:.0f} s") from None
    except asyncio.CancelledError:
        process.terminate()
        raise
    finally:
        os.close(read)
    if not ready:
        raise ShimStartError(f"the userspace kernel ended at once with status {process.wait()}; its log says why")
    return process
