"""Named network namespaces as iproute2 keeps them (ip/ipnetns.c), without its processes: a test bed has many, and in the emulated kernel each costs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

NETNS_DIRECTORY: Final = Path("/run/netns")
CLONE_NEWNET: Final = 0x40000000
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _on_a_thread(function: Callable[[], T]) -> T:
    """Its network namespace is the thread's own, and goes with it."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="in-namespace")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def in_namespace(path: Path, function: Callable[[], T]) -> T:
    """Call `function` on a thread of its own that has entered the network namespace; sockets made there stay there."""

    def entered() -> T:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc.setns(fd, CLONE_NEWNET), str(path))
        finally:
            os.close(fd)
        return function()

    return _on_a_thread(entered)


def _share_directory() -> None:
    """A namespace that is removed goes from every mount namespace, not only from ours: else it stays while any of those does."""
    NETNS_DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    directory = os.fsencode(NETNS_DIRECTORY)
    if _libc.mount(b"", directory, b"none", MS_SHARED | MS_REC, None) and ctypes.get_errno() == errno.EINVAL:  # no mount point yet
        _checked(_libc.mount(directory, directory, b"none", MS_BIND | MS_REC, None), str(NETNS_DIRECTORY))
        _checked(_libc.mount(b"", directory, b"none", MS_SHARED | MS_REC, None), str(NETNS_DIRECTORY))


def make(name: str) -> None:
    """`ip netns add`."""
    _share_directory()
    path = NETNS_DIRECTORY / name
    path.touch(mode=0o444, exist_ok=False)

    def unshared() -> None:
        _checked(_libc.unshare(CLONE_NEWNET), name)
        _checked(_libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), b"none", MS_BIND, None), name)

    _on_a_thread(unshared)


def remove(name: str) -> None:
    """`ip netns delete`, if it is there."""
    path = NETNS_DIRECTORY / name
    _libc.umount2(os.fsencode(path), MNT_DETACH)
    path.unlink(missing_ok=True)


def pids(name: str) -> list[int]:
    """`ip netns pids`: every process whose main thread lives there."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError):
        wanted = (NETNS_DIRECTORY / name).stat().st_ino
        for word in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it ended
                if os.stat(f"/proc/{word}/ns/net").st_ino == wanted:
                    found.append(int(word))
    return found
