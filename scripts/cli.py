"""The command `mfuser`: runs one of the scripts in this folder."""

import importlib
import sys

COMMANDS = {
    "segment": ("segment", "segment images with a trained model"),
    "prepare": ("prepare_domain", "convert a dataset's official download to train ids in the format of `datasets`"),
    "app": ("app", "segment images on a page in the browser"),
    "train": ("train", "train or fine-tune from a recipe"),
    "evaluate": ("evaluate", "score a model on any number of domains"),
    "benchmark": ("benchmark", "measure the time of a model's parts on this machine"),
    "convert": ("convert_checkpoint", "convert a published checkpoint to a Transformers folder"),
}

# Packages that an extra installs.
EXTRAS = {"accelerate": "train", "datasets": "train", "evaluate": "train", "yaml": "train", "gradio": "app"}


def usage() -> str:
    """The help text, which lists the commands."""
    commands = "\n".join(f"  {name:<10} {help_text}" for name, (_, help_text) in COMMANDS.items())
    return f"usage: mfuser COMMAND [ARGUMENTS]\n\ncommands (see mfuser COMMAND --help):\n{commands}"


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments (`list[str]`, *optional*):
            The command's name and its arguments; by default those of the process.

    Returns:
        `int`: The exit code. It is 2 if the command is unknown or one of its packages is not installed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"mfuser: unknown command {arguments[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"mfuser.scripts.{COMMANDS[arguments[0]][0]}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        install = f'pip install "mfuser[{EXTRAS[error.name]}]"'
        print(f"mfuser {arguments[0]} needs the package {error.name}: {install}", file=sys.stderr)
        return 2
    return module.main(arguments[1:])
