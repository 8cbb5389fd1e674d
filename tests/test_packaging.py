"""The content of the wheel, and the code in the folder of the demonstration model."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
import sync_demonstration

import mfuser

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "evaluation", "scripts", "training")
DEMONSTRATION = "checkpoints/mfuser-tiny-camvid"

# Builds as pip does without isolation, and reports whether that imported the package.
BUILD = """
import sys
from setuptools import build_meta

build_meta.build_wheel(sys.argv[1])
assert not {"torch", "transformers", "mfuser"} & sys.modules.keys()
"""


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The opened wheel, built offline from a copy of the tree: leftovers in build/ would otherwise get into it."""
    workspace = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "fixtures", "runs", "segmented")
    shutil.copytree(ROOT, workspace / "tree", ignore=left_out)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(workspace)], cwd=workspace / "tree", check=True, capture_output=True
    )
    (path,) = workspace.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = [path for folder in (".", *PACKAGES) for path in (ROOT / folder).glob("*.py")]
    files += [ROOT / "py.typed", *(ROOT / "recipes").glob("*.yaml"), *(ROOT / "scripts/templates").iterdir()]
    files += [
        ROOT / DEMONSTRATION / name
        for name in ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ]
    installed = {name for name in wheel.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    assert installed == {f"mfuser/{path.relative_to(ROOT).as_posix()}" for path in files}


def test_every_package_of_the_tree_is_listed():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PACKAGES)


def test_the_wheel_holds_each_content_once(wheel):
    names: dict[str, list[str]] = {}
    for info in wheel.infolist():
        if info.file_size > 0:
            names.setdefault(hashlib.sha256(wheel.read(info)).hexdigest(), []).append(info.filename)
    assert [group for group in names.values() if len(group) > 1] == []


def test_the_version_has_one_place(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = BytesParser().parsebytes(wheel.read(name))
    assert metadata["Version"] == mfuser.__version__
    assert mfuser.__version__ not in (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "version:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace("cff-version:", "")


def test_the_installed_version_is_that_of_the_code():
    assert importlib.metadata.version("mfuser") == mfuser.__version__, "install the package again"


# The demonstration


def test_the_code_of_the_demonstration_is_that_of_the_package():
    needed = {path.name for path in (ROOT / DEMONSTRATION).glob("*.py")}
    assert {"configuration_mfuser.py", "image_processing_mfuser.py", "modeling_mfuser.py"} <= needed
    stale = sync_demonstration.differences()
    assert stale == [], f"run tools/sync_demonstration.py: {', '.join(stale)}"


@pytest.fixture
def model_folder(tmp_path):
    """A package whose model imports `layers`, which imports `scan` in a `try` block, and a folder that names it."""
    root, folder = tmp_path / "package", tmp_path / "demonstration"
    root.mkdir()
    folder.mkdir()
    (root / "modeling.py").write_text("from .layers import Layer\n")
    (root / "layers.py").write_text("try:\n    from .scan import scan\nexcept ImportError:\n    scan = None\n")
    (root / "scan.py").write_text("def scan():\n    from .modeling import Model\n")
    (root / "processing.py").write_text("import os\n")
    (root / "training.py").write_text("from .modeling import Model\n")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Model"}}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "processing.P"}}))
    return folder, root


def test_a_model_folder_gets_the_files_that_its_auto_map_reaches(model_folder):
    folder, root = model_folder
    names = ["layers.py", "modeling.py", "processing.py", "scan.py"]
    assert sync_demonstration.synchronise(folder, root) == names
    assert sorted(path.name for path in folder.glob("*.py")) == names
    assert sync_demonstration.synchronise(folder, root) == []


@pytest.mark.parametrize("damage", ["changed", "missing", "superfluous", "link"])
def test_stale_code_in_a_model_folder_is_found_and_repaired(model_folder, damage):
    folder, root = model_folder
    sync_demonstration.synchronise(folder, root)
    stale = folder / ("training.py" if damage == "superfluous" else "layers.py")
    if damage != "changed":
        stale.unlink(missing_ok=True)
    if damage == "link":
        stale.symlink_to(root / "layers.py")
    elif damage != "missing":
        stale.write_text("# old\n")
    assert sync_demonstration.differences(folder, root) == [stale.name]
    sync_demonstration.synchronise(folder, root)
    assert sync_demonstration.differences(folder, root) == []
    assert not (folder / "layers.py").is_symlink()
