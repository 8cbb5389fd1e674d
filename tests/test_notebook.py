"""The example notebook runs from the first cell to the last, and trains a good model."""

import re
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "fine_tune.ipynb"


def executed(folder: Path):
    """The notebook after its execution in a copy of its folder."""
    (folder / "examples").mkdir()
    (folder / "examples" / "street.jpg").symlink_to(ROOT / "examples" / "street.jpg")
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(folder / "examples")}}
    return nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=place).execute()


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_notebook_runs_and_fine_tunes_a_good_model(tmp_path, monkeypatch):
    text = printed(executed(tmp_path))
    assert re.search(r"road +\d+\.\d%", text)
    (score,) = re.findall(r"mean_iou +(\d+\.\d)%", text)
    assert float(score) > 80
    assert (tmp_path / "examples" / "runs" / "scenes" / "modeling_mfuser.py").is_file()


def test_the_notebook_is_stored_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
