"""How a command ends: its exit code, and one line for an error of its input."""

import re
import sys
from collections.abc import Callable

import torch
from filelock import Timeout
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# Errors of files, settings, data and memory. Others are bugs, for which the traceback is needed.
INPUT_ERRORS = (
    *(ValueError, OSError, ImportError, FloatingPointError, MemoryError, torch.OutOfMemoryError),
    *(SafetensorError, StrictDataclassError, Timeout),
)


def run_command(name: str, function: Callable[[list[str]], int], arguments: list[str]) -> int:
    """
    Runs a command and reports errors of its input.

    Args:
        name (`str`):
            The name of the command in the message, such as "mfuser train".
        function (`Callable`):
            Takes the arguments without `--debug` and returns the exit code.
        arguments (`list[str]`):
            The arguments. With `--debug` among them, errors are raised, so that their traceback is shown.

    Returns:
        `int`: The exit code: that of the function, 2 after an error, or 130 if the command was interrupted.
    """
    debug = "--debug" in arguments
    try:
        return function([argument for argument in arguments if argument != "--debug"])
    except INPUT_ERRORS as error:
        if debug:
            raise
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, and without the traceback that a worker process adds to it."""
    text = str(error)
    if re.match(r"Caught \w+ in DataLoader worker", text):
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2] or text
    return " ".join(text.split()) or type(error).__name__


__all__ = ["one_line", "run_command"]
