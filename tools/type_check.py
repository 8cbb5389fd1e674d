"""Runs mypy on the package.

The repository root is the package `mfuser`, regardless of the folder's name, so mypy cannot find it by name. This
script links the root as `build/typecheck/mfuser`, where the settings in pyproject.toml look for it, and prints paths
relative to the root. After the first run, `mypy` without arguments works as well.
"""

import os
import sys
from pathlib import Path

from mypy import api

ROOT = Path(__file__).resolve().parent.parent
LINK = Path("build", "typecheck", "mfuser")


def main(arguments: list[str]) -> int:
    os.chdir(ROOT)
    if not LINK.exists():
        LINK.parent.mkdir(parents=True, exist_ok=True)
        LINK.symlink_to(Path("..", ".."), target_is_directory=True)
    report, errors, exit_code = api.run(arguments)
    sys.stdout.write(report.replace(f"{LINK}{os.sep}", ""))
    sys.stderr.write(errors)
    return exit_code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
