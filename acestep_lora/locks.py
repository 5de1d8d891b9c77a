"""Locks between processes. The operating system lets go of them when their process ends, however it ends."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from acestep_lora.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` inside the block. While another process holds it: say `busy` and wait, or raise it.

    On a file system without locks, which some network shares are, this says so and does not lock.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
        log.info("%s Waiting for it.", busy)
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        log.warning("%s has no locks: do not use it from two processes at once", path.parent)
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock file."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False
