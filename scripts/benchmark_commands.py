"""Time of whole commands: the start of `mfuser segment`, and the parts of `mfuser evaluate`."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from mfuser.errors import CommandError
from mfuser.scripts.arguments import DEFAULT_MODEL
from mfuser.scripts.benchmark_measuring import in_turns

IMAGE = Path(__file__).resolve().parent.parent / "examples" / "street.jpg"
COMMAND = "import sys; from mfuser.scripts.cli import main; sys.exit(main())"


def run_process(code: str, *arguments: str):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"{' '.join(arguments)} ended with exit code {done.returncode}: {done.stderr.strip()}")


def benchmark_start(options) -> list[dict]:
    """Fresh processes: what `mfuser segment` of one image imports, and the whole command."""
    for needed in (DEFAULT_MODEL, IMAGE):
        if not needed.exists():
            raise CommandError(f"the benchmark start needs {needed}, which is part of the repository")
    with tempfile.TemporaryDirectory() as folder:
        segment = ("segment", str(IMAGE), "--output", folder)
        processes = {
            "python": partial(run_process, ""),
            "import torch": partial(run_process, "import torch"),
            "import transformers.modeling_utils": partial(run_process, "import transformers.modeling_utils"),
            "mfuser --help": partial(run_process, COMMAND, "--help"),
            "mfuser segment --help": partial(run_process, COMMAND, "segment", "--help"),
            "import mfuser.scripts.segment": partial(run_process, "import mfuser.scripts.segment"),
            "mfuser segment, one image of 960 x 720": partial(run_process, COMMAND, *segment),
        }
        seconds = in_turns(processes, options.rounds, "cpu")
    return [{"process": name, "s": value} for name, value in seconds.items()]
