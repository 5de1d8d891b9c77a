"""Signals that ask a run to stop: it saves first. Ctrl+C twice does not wait for that."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""What a terminal, `kill`, a lost connection and Slurm (before its time limit) send."""

ECHO = 0.2
"""Seconds within which a second SIGINT is the first one again: some launchers pass on what the terminal sent too."""


class Interrupted(BaseException):
    """The run was asked to stop and has. Like KeyboardInterrupt, no error that somebody should catch."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


@contextmanager
def _handling(handler) -> Iterator[None]:
    """`handler` for every signal that is not ignored, as under nohup, inside the block; the main thread's affair."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextmanager
def raising(message: str) -> Iterator[None]:
    """Interrupted, with this message, at a signal inside the block, and for any error that comes after one.

    An import that is interrupted may clear the exception and say that its module is missing, as numpy's does.
    """
    stopped = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = Interrupted(number, message)
        raise stopped

    with _handling(stop):
        try:
            yield
        except Exception as error:
            if stopped is None:
                raise
            raise stopped from error


class Interrupt:
    """Remembers the first signal, for a run to look at where it can stop; the next SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        with _handling(self._take):
            yield

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            # not print: the signal may have come in the middle of one
            os.write(2, b"\nstopping: the step in progress is finished and saved; Ctrl+C again leaves at once\n")
        elif number == signal.SIGINT and time.monotonic() > self._since + ECHO:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)


def ignore(worker: int) -> None:
    """For the processes of a DataLoader: a signal to the whole group is for the one that trains, which ends them."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def requeue() -> bool:
    """Ask Slurm to run this job again, which its SIGUSR1 is for (#SBATCH --signal=USR1@120) -> whether it will."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = "_".join(job) if all(job) else os.environ.get("SLURM_JOB_ID")
    if name is None:
        return False
    try:
        return subprocess.run(["scontrol", "requeue", name], check=False).returncode == 0
    except OSError:
        return False
