"""
The command `mfuser`: runs one of the scripts in this folder, and reports errors in the same way for all of them.

An error caused by input ends a command with exit code 2 and one line on stderr, `mfuser COMMAND: MESSAGE`, which
names the file or setting and what is accepted. `--debug`, anywhere on the command line, shows the traceback as well.
Other exceptions are bugs and keep their traceback. Ctrl-C ends a command with exit code 130.
"""

import functools
import gc
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

from mfuser.errors import CommandError, is_expected, one_line

COMMANDS = {
    "segment": ("segment", "segment images with a trained model"),
    "prepare": ("prepare_domain", "convert a dataset's official download to train ids in the format of `datasets`"),
    "app": ("app", "segment images in a local web app"),
    "train": ("train", "train or fine-tune from a recipe"),
    "evaluate": ("evaluate", "score a model on any number of domains"),
    "report": ("report", "turn results of evaluate into a report, and compare them"),
    "calibrate": ("calibrate", "fit the confidences of a model on its source"),
    "benchmark": ("benchmark", "measure the time of a model's parts on this machine"),
    "export": ("export", "export a model to torch.export, ONNX or AOTInductor"),
    "convert": ("convert_checkpoint", "convert a published checkpoint to a Transformers folder"),
}

# Packages that an extra installs.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "evaluate": "train",
    "yaml": "train",
    "gradio": "app",
    "jinja2": "report",
}
# Modules that parse the arguments of a command without its libraries, so that `--help` is fast.
ARGUMENTS = {"segment": "segment_arguments"}
# Commands with a fast start, and the packages that Transformers would import if they are installed, although the
# command does not use them.
QUICK = {"segment": ("torchao", "scipy", "sklearn")}
DEBUG = "--debug"
FAILED, INTERRUPTED = 2, 130  # exit codes


class Main(Protocol):
    """The `main` of a command, or one that reports errors."""

    def __call__(self, arguments: list[str] | None = None, /) -> int: ...


__all__ = ["CommandError", "main", "reports_errors", "usage"]


def reports_errors(command: str) -> Callable[[Main], Main]:
    """
    Decorator of a command's `main` that reports errors as this module describes.

    Args:
        command (`str`):
            The name of the command, for its messages.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None) -> int:
            arguments = list(sys.argv[1:] if arguments is None else arguments)
            debug = DEBUG in arguments
            try:
                return main([argument for argument in arguments if argument != DEBUG])
            except KeyboardInterrupt:
                print(f"mfuser {command}: interrupted", file=sys.stderr)
                return INTERRUPTED
            except Exception as error:
                if not is_expected(error):
                    raise
                if debug:
                    traceback.print_exc()
                print(f"mfuser {command}: {one_line(error)}", file=sys.stderr)
                return FAILED

        return run

    return decorate


def usage() -> str:
    """The help text, which lists the commands."""
    commands = "\n".join(f"  {name:<10} {help_text}" for name, (_, help_text) in COMMANDS.items())
    return (
        f"usage: mfuser COMMAND [ARGUMENTS] [{DEBUG}]\n\ncommands (see mfuser COMMAND --help):\n{commands}\n\n"
        f"{DEBUG} shows the traceback of an error. Exit codes: 0 success, 1 some inputs were skipped, 2 the command "
        "could not run, 130 interrupted."
    )


@contextmanager
def quick_imports(unused: Sequence[str]) -> Iterator[None]:
    """
    Speeds up the imports in its block, for a process that ends with `os._exit`.

    Args:
        unused (`Sequence[str]`):
            Packages that appear as not installed. They can be imported after the block.
    """
    hidden = [name for name in unused if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # `None`: no such module, see `import`
    gc.disable()  # modules are kept; searching their objects for garbage takes a sixth of the time
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
            # Transformers keeps the answer, and a model that torchao quantised needs it.
            if found := getattr(sys.modules.get("transformers.utils"), f"is_{name}_available", None):
                found.cache_clear()
        gc.enable()
        gc.freeze()  # nor are they searched later


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments (`list[str]`, *optional*):
            The command's name and its arguments; by default those of the process.

    Returns:
        `int`: The exit code. It is 2 if the command is unknown or one of its packages is not installed.
    """
    is_process = arguments is None  # the process runs this command only
    if is_process:
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the command
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == DEBUG:
        arguments = [*arguments[1:], DEBUG]
    if not arguments or arguments[0] in ("-h", "--help", DEBUG):
        print(usage())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"mfuser: unknown command {arguments[0]!r}\n\n{usage()}", file=sys.stderr)
        return FAILED
    command = arguments[0]
    quick = is_process and command in QUICK
    try:
        with quick_imports(QUICK[command]) if quick else nullcontext():
            if command in ARGUMENTS:
                reader = importlib.import_module(f"mfuser.scripts.{ARGUMENTS[command]}")
                reader.parse_arguments([argument for argument in arguments[1:] if argument != DEBUG])
            module = importlib.import_module(f"mfuser.scripts.{COMMANDS[command][0]}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        install = f'pip install "mfuser[{EXTRAS[error.name]}]"'
        print(f"mfuser {arguments[0]} needs the package {error.name}: {install}", file=sys.stderr)
        return FAILED
    code = module.main(arguments[1:])
    if quick:
        # All files are closed. The teardown of the libraries' modules would take as long as segmenting an image.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
