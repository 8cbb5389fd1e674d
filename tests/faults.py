"""Faults at every access to a file: the process is killed there, or the disk is full from there on."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# Python's audit events of operations that change files: the positions of paths among their arguments, and those of the
# open folders that relative paths refer to (`shutil.rmtree` uses them).
EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NO_SPACE = {"open", "os.mkdir"}  # operations that need space on the disk
FINISHED, FAILED = 0, 3


def run_with_fault(action: Callable[[], object], folder: Path, number: int, kind: str) -> int:
    """
    Runs an action in a child process with a fault at its n-th change of a file in a folder.

    Args:
        action (`Callable`):
            The action.
        folder (`Path`):
            Changes of files elsewhere are not counted.
        number (`int`):
            The number of the change, from 1.
        kind (`str`):
            "kill" ends the process by SIGKILL before the change. "full" makes it and all later ones fail as they do on
            a full disk.

    Returns:
        `int`: `FINISHED` if the action has fewer changes, `FAILED` if it raised an `OSError` or another error of a
        full disk, `-signal.SIGKILL` if it was killed.
    """
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(_fault(str(folder), number, kind))
            action()
            os._exit(FINISHED)
        except BaseException as error:
            if "No space left" not in str(error):
                traceback.print_exc()
                os._exit(1)
            os._exit(FAILED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def path_of(arguments: tuple, position: int, folder: int | None) -> str:
    """The path that an event names, with the folder that it is relative to."""
    path, descriptor = arguments[position], -1 if folder is None else arguments[folder]
    if isinstance(path, int):
        return ""
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else "", os.fsdecode(path))


def _fault(folder: str, number: int, kind: str):
    count = 0

    def hook(event: str, arguments: tuple):
        nonlocal count
        if event not in EVENTS:
            return
        paths = [path_of(arguments, *positions) for positions in EVENTS[event]]
        if not any(path.startswith(folder) for path in paths):
            return
        if event == "open" and not (arguments[2] or 0) & WRITING:
            return
        if kind == "full" and event not in NO_SPACE:
            return
        count += 1
        if kind == "kill" and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and count >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[0])

    return hook
