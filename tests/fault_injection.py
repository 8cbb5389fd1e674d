"""Runs an action in a forked process that is killed, or whose disk is full, at one of its file operations."""

import errno
import os
import resource
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
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FINISHED, FULL, NOT_FORKED = 0, 3, 70  # exit codes; the last is that of an exception


def kill(event: str, path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(event: str, path: str) -> None:
    if event in ("os.remove", "os.rmdir"):
        return  # these succeed on a full disk
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def run(
    action: Callable[[], int], folder: Path, fault: Callable[[str, str], None] | None = None, at: int = 0,
    file_size: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """
    Runs `action` in a forked process.

    Args:
        action (`Callable`):
            Returns an exit code.
        folder (`Path`):
            Operations that change files below it count.
        fault (`Callable`, *optional*), at (`int`):
            `fault` is called with the audit event and the path before operation number `at`, from 0, and before all
            that follow.
        file_size (`int`, *optional*):
            Bytes that a file can have; writing more fails, also in native code.

    Returns:
        `tuple[int, int]`: The exit code, negative for a signal, and the number of operations.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def before(event: str, arguments: tuple) -> None:
            nonlocal count
            if event not in EVENTS or (event == "open" and not (arguments[2] or 0) & WRITING):
                return
            paths = [path_of(arguments, *positions) for positions in EVENTS[event]]
            if not any(path.startswith(str(folder)) for path in paths):
                return
            count += 1
            if fault is not None and count > at:
                fault(event, paths[0])

        code = NOT_FORKED
        try:
            if file_size is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            sys.addaudithook(before)
            code = action()
            os.write(sender, str(count).encode())
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(sender)
    _, status = os.waitpid(child, 0)
    with os.fdopen(receiver) as stream:
        return os.waitstatus_to_exitcode(status), int(stream.read() or 0)


def path_of(arguments: tuple, position: int, folder: int | None) -> str:
    """The path that an event names, with the folder that it is relative to."""
    path, descriptor = arguments[position], -1 if folder is None else arguments[folder]
    if isinstance(path, int):
        return ""
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else "", os.fsdecode(path))


def full_disk_is_an_exit_code(action: Callable[[], object]) -> Callable[[], int]:
    """The action as `run` expects it: it returns `FINISHED`, or `FULL` if it raises the error of a full disk."""

    def finished() -> int:
        try:
            action()
        except Exception as error:
            if "No space left" not in str(error):
                raise
            return FULL
        return FINISHED

    return finished
