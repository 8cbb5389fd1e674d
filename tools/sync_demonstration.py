"""Copies the model code into the demonstration folder, so that it works with `trust_remote_code` in any checkout.

The copies are the modules that the folder's `auto_map` entries name and the modules that these import relatively. They
are regular files, since a checkout on a system without symbolic links contains a text file in place of each link. Run
this after a change to the model code; `--check` reports stale files and changes nothing.
"""

import argparse
import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMONSTRATION = ROOT / "checkpoints" / "mfuser-tiny-camvid"


def auto_map_modules(folder: Path) -> set[str]:
    """The modules that the configuration files of a model folder name."""
    modules = set()
    for name in ("config.json", "preprocessor_config.json"):
        auto_map = json.loads((folder / name).read_text(encoding="utf-8"))["auto_map"]
        modules |= {reference.partition(".")[0] for reference in auto_map.values()}
    return modules


def relative_imports(path: Path) -> set[str]:
    """The sibling modules that a file imports, also inside functions and `try` blocks."""
    imports = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom))
    return {node.module for node in imports if node.level == 1 and node.module}


def code_files(folder: Path = DEMONSTRATION, root: Path = ROOT) -> list[str]:
    """
    Names of the code files that a model folder needs.

    Args:
        folder (`Path`):
            The model folder, with `config.json` and `preprocessor_config.json`.
        root (`Path`):
            Where the modules lie.

    Returns:
        `list[str]`: File names, sorted.
    """
    found: set[str] = set()
    pending = auto_map_modules(folder)
    while pending:
        module = pending.pop()
        found.add(module)
        pending |= relative_imports(root / f"{module}.py") - found
    return sorted(f"{module}.py" for module in found)


def differences(folder: Path = DEMONSTRATION, root: Path = ROOT) -> list[str]:
    """Names of the code files in `folder` that are missing, superfluous, links, or different from those in `root`."""
    needed = code_files(folder, root)
    present = [path.name for path in folder.glob("*.py")]

    def current(name: str) -> bool:
        copy = folder / name
        return name in needed and name in present and not copy.is_symlink() and same_bytes(copy, root / name)

    return [name for name in sorted({*needed, *present}) if not current(name)]


def same_bytes(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


def synchronise(folder: Path = DEMONSTRATION, root: Path = ROOT) -> list[str]:
    """Makes the code files in `folder` equal to those in `root` and returns the names of those that changed."""
    needed = code_files(folder, root)
    changed = differences(folder, root)
    for name in changed:
        (folder / name).unlink(missing_ok=True)
        if name in needed:
            (folder / name).write_bytes((root / name).read_bytes())
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="report stale files, exit with 1 if there are any")
    check = parser.parse_args(arguments).check
    names = differences() if check else synchronise()
    for name in names:
        print(f"{DEMONSTRATION.relative_to(ROOT) / name}: {'stale' if check else 'updated'}")
    return int(bool(names))


if __name__ == "__main__":
    raise SystemExit(main())
