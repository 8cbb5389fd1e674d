"""Runs an action in a forked process that is killed, or whose disk is full, at one of its file operations."""

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
NOT_FORKED = 70  # exit code of an exception


def kill(event: str, path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(event: str, path: str) -> None:
    if event in ("os.remove", "os.rmdir"):
        return  # these succeed on a full disk
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def run(
    action: Callable[[], int], folder: Path, fault: Callable[[str, str], None] | None = None, at: int = -1,
    file_size: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """
    Runs `action` in a forked process.

    Args:
        action (`Callable`):
            Returns an exit code.
        folder (`Path`):
            File operations below it count.
        fault (`Callable`, *optional*), at (`int`):
            `fault` is called with the audit event and the path before file operation number `at`.
        file_size (`int`, *optional*):
            Bytes that a file can have; writing more fails, also in native code.

    Returns:
        `tuple[int, int]`: The exit code, negative for a signal, and the number of file operations.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def before(event: str, arguments: tuple) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS
            if not (writes or event in OPERATIONS) or not str(arguments[0]).startswith(str(folder)):
                return
            count += 1
            if fault is not None and count - 1 == at:
                fault(event, str(arguments[0]))

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
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(sender)
    _, status = os.waitpid(child, 0)
    with os.fdopen(receiver) as stream:
        return os.waitstatus_to_exitcode(status), int(stream.read() or 0)
