"""Arguments that several commands share. Importing this module imports no library."""

import argparse
from pathlib import Path
from typing import Any

# Included in the repository, so that commands run offline.
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "mfuser-tiny-camvid"


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, an available `torch.device`."""
    # argparse converts a string default like a given value, but not for `--help`.
    parser.add_argument(
        "--device", type=available_device, default="auto", help="e.g. cpu, cuda, cuda:1 (default: cuda if available)"
    )


def available_device(text: str) -> Any:
    """The device of an argument; "auto" is a GPU if there is one."""
    import torch

    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be an available device: {str(error).splitlines()[0]}"
        ) from None


def add_quantize_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--quantize`, a kind of [`~quantization.quantize`]."""
    parser.add_argument(
        "--quantize",
        choices=("int8-weight-only", "int8-dynamic"),
        help="quantise the encoders; int8-weight-only: a quarter of their memory, on any device; int8-dynamic: also "
        "faster, on a CPU (default: no quantisation)",
    )
