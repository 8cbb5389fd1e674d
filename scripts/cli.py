"""`mfuser <command> ...`: one entry point for the scripts beside this file."""

import importlib
import sys

COMMANDS = {
    "segment": ("segment", "segment images with a trained model"),
    "prepare": ("prepare_domain", "turn a dataset's official download into train ids that `datasets` loads"),
    "train": ("train", "train or fine-tune from a recipe"),
    "evaluate": ("evaluate", "score a model on any number of domains"),
    "benchmark": ("benchmark", "time the parts of a model on this machine"),
    "convert": ("convert_checkpoint", "convert a published checkpoint to a Transformers folder"),
}

TRAINING_PACKAGES = ("accelerate", "datasets", "evaluate", "yaml")  # of the extra [train]


def usage() -> str:
    commands = "\n".join(f"  {name:<10} {help_text}" for name, (_, help_text) in COMMANDS.items())
    return f"usage: mfuser COMMAND [ARGUMENTS]\n\ncommands (each explains itself with --help):\n{commands}"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"mfuser: no command {arguments[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"mfuser.scripts.{COMMANDS[arguments[0]][0]}")
    except ModuleNotFoundError as error:
        if error.name not in TRAINING_PACKAGES:
            raise
        print(f'mfuser {arguments[0]} needs {error.name}: pip install "mfuser[train]"', file=sys.stderr)
        return 2
    return module.main(arguments[1:])
