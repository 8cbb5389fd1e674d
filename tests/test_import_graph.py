"""Imports point downwards, and the figure of the import graph is current."""

import ast
import sys
from pathlib import Path

import import_graph
import pytest
import sync_demonstration

ROOT = Path(__file__).parents[1]


def test_imports_point_downwards():
    graph = import_graph.read_imports()
    assert import_graph.upward_imports(graph, import_graph.layers(graph)) == []


def test_no_modules_import_each_other():
    graph = import_graph.read_imports()
    assert "modeling_mfuser" in graph["scripts.segmentation"] and "configuration_mfuser" in graph["modeling_mfuser"]
    assert import_graph.cycle(graph) == []


def test_the_model_files_import_only_what_remote_code_may_need():
    """Anything else must be optional: inside a `try` block."""
    allowed = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"} | sys.stdlib_module_names
    found = set()
    for name in sync_demonstration.code_files():
        for node in ast.parse((ROOT / name).read_bytes()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    assert found - allowed == set()
    assert {"torch", "transformers", "numpy"} <= found


def test_the_figure_of_the_import_graph_is_current(capsys):
    assert import_graph.main(["--check"]) == 0, capsys.readouterr().out


def write_package(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_every_kind_of_import_is_read(tmp_path):
    write_package(
        tmp_path,
        {
            "__init__.py": "__version__ = '1'\n",
            "model.py": "import torch\nfrom .layers import Layer\n",
            "layers.py": "import os\n",
            "scripts/__init__.py": "",
            "scripts/train.py": "from mfuser import __version__, model\nimport mfuser.data.rows, mfuser.files\n",
            "scripts/run.py": "def main():\n    try:\n        from . import train\n    finally:\n        pass\n",
            "data/__init__.py": "",
            "data/rows.py": "from mfuser.layers import Layer as L\nfrom ..files import write\n",
            "files.py": "import mfuserlike.model\n",
            "tests/test_model.py": "import mfuser.model\n",
        },
    )
    assert import_graph.read_imports(tmp_path) == {
        "__init__": set(),
        "data.rows": {"files", "layers"},
        "files": set(),
        "layers": set(),
        "model": {"layers"},
        "scripts.run": {"scripts.train"},
        "scripts.train": {"__init__", "data.rows", "files", "model"},
    }


def test_upward_imports_and_cycles_are_found():
    graph = {"modeling": {"data.rows"}, "data.rows": {"files"}, "scripts.run": {"data.rows"}, "files": set()}
    layer = {module: import_graph.layer_of(module, {"modeling"}) for module in graph}
    assert import_graph.upward_imports(graph, layer) == ["modeling -> data.rows"]
    assert import_graph.cycle(graph) == []
    graph["files"] = {"scripts.run"}
    assert set(import_graph.cycle(graph)) == {"data.rows", "files", "scripts.run"}


def test_only_arrows_that_follow_from_others_are_left_out():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"e"}, "d": set(), "e": set()}
    assert import_graph.reduced(graph) == {"a": {"b", "d"}, "b": {"c"}, "c": {"e"}, "d": set(), "e": set()}


@pytest.mark.slow
def test_boxes_of_the_figure_do_not_overlap():
    graph = import_graph.reduced(import_graph.read_imports())
    drawing = import_graph.arrange_group({module: graph[module] for module in graph})
    boxes = [drawing.items[module] for module in graph]
    for index, first in enumerate(boxes):
        for second in boxes[index + 1 :]:
            apart_in_x = abs(first.x - second.x) >= (first.width + second.width) / 2 - 0.01
            assert apart_in_x or abs(first.y - second.y) >= first.height
