"""Folders of `mfuser train`: no run overwrites the results of another one, or continues it with other settings."""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from tiny_recipe import write_data, write_recipe

from mfuser.scripts import train
from mfuser.training.optimization import PolynomialSchedule
from mfuser.training.run_folders import check_output_dir, locked


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """Folder of a finished run of the recipe, with two checkpoints. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    assert train.main([str(write_recipe(folder, data))]) == 0
    return folder / "run"


@pytest.fixture
def recipe(tmp_path, data):
    return write_recipe(tmp_path, data)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, in the folder that the recipe names."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def files_in(folder: Path) -> dict[str, str]:
    """The hash of every file, by its path; without the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "_lock"
    }


def message_of(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfuser train: ")]
    return line


# --- guarantee: settings that are refused, the messages, and that everything is kept ---------------------------------

REFUSED = {
    "a used folder": (
        [],
        "which is not empty: it holds README.md; resume=true continues a run, overwrite_output_dir=",
    ),
    "both at once": (["resume=true", "overwrite_output_dir=true"], "a run continues an earlier one or replaces it"),
    "a checkpoint that does not exist": (["resume=nowhere"], "resume is nowhere, which has no trainer_state.json; it"),
    "a checkpoint of another folder": (["resume={other}/checkpoint-1"], "is not in it; give an empty output_dir"),
    "another learning rate": (
        ["resume=true", "learning_rate=1e-4", "max_steps=4"],
        "learning_rate was 0.001 and is 0.0001. Resume with the same settings",
    ),
    "another schedule and batch size": (
        ["resume=true", "warmup_steps=1", "per_device_train_batch_size=1", "max_steps=4"],
        "per_device_train_batch_size was 2 and is 1; warmup_steps was 0 and is 1. Resume",
    ),
    "another seed": (["resume=true", "seed=1", "max_steps=4"], "seed was 42 and is 1"),
    "another augmentation": (
        ["resume=true", "augmentation.flip_probability=0", "max_steps=4"],
        "augmentation.flip_probability was 0.5 and is 0",
    ),
    "samples of incomplete batches": (
        ["resume=true", "dataloader_drop_last=true", "max_steps=4"],
        "dataloader_drop_last was False and is True",
    ),
    "another sampling": (
        ["resume=true", "rare_class_sampling=no", "max_steps=4"],
        "rare_class_sampling was True and is False",
    ),
    "another model": (
        ["resume=true", "model_config.loss_num_points=32", "max_steps=4"],
        "model_config.loss_num_points was 64 and is 32",
    ),
    "frozen encoders": (
        ["resume=true", "model_config.freeze_encoders=true", "max_steps=4"],
        "model_config.freeze_encoders was False and is True; frozen_weights was ",
    ),
    "other data": (
        ["resume=true", "train_data={other_data}", "max_steps=4"],
        "train_data was {data} (train, 6 rows, ",
    ),
    "fewer steps than are done": (
        ["resume=true", "max_steps=1"],
        "max_steps is 1; {run}/checkpoint-2 is already at step 2, so it must be at least that",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_would_lose_or_mix_results_is_refused_and_everything_is_kept(
    case, finished, run, recipe, data, tmp_path, capsys
):
    settings, message = REFUSED[case]
    other_data = tmp_path / "other-data"
    if "other_data" in str(settings):
        shutil.copytree(data, other_data)
        write_data(other_data, seed=1)
    places = {"other": finished, "data": data, "run": run, "other_data": other_data}
    before = files_in(run)
    assert train.main([str(recipe), *(setting.format(**places) for setting in settings)]) == 2
    expected = message if "{}" in message else message.format(**places)
    assert expected in message_of(capsys)
    assert files_in(run) == before


def test_a_file_in_place_of_the_folder_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert train.main([str(recipe)]) == 2
    assert "which is a file; it must be a folder" in message_of(capsys)


def test_a_model_without_checkpoints_is_not_overwritten_by_resuming(run, recipe, capsys):
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = files_in(run)
    assert train.main([str(recipe), "resume=true"]) == 2
    assert "which holds README.md but no checkpoint to resume from" in message_of(capsys)
    assert files_in(run) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("resume", "which holds README.md but no checkpoint to resume from; give an empty folder"),
        ("overwrite_output_dir", "whose README.md was not written by `mfuser train`; give another folder"),
    ],
)
def test_files_of_something_else_are_neither_replaced_nor_deleted(setting, message, recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("README.md", "adapter.safetensors"):
        (tmp_path / "run" / name).write_text("mine")
    before = files_in(tmp_path / "run")
    assert train.main([str(recipe), f"{setting}=true"]) == 2
    assert message in message_of(capsys)
    assert files_in(tmp_path / "run") == before


def test_a_finished_run_without_checkpoints_can_be_overwritten(run):
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    check_output_dir(run, resume=False, overwrite=True)


def test_overwriting_deletes_the_earlier_run_and_keeps_other_files(finished, run, recipe):
    (run / "notes.txt").write_text("mine")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9")
    assert train.main([str(recipe), "overwrite_output_dir=true"]) == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (run / "notes.txt").read_text() == "mine"
    assert files_in(run)["model.safetensors"] == files_in(finished)["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["save_steps=2", "logging_steps=2", "dataloader_num_workers=1", "save_total_limit=1", "monitor_steps=3"],
        ["train_data={moved}", "validation_data={moved}"],
    ],
)
def test_settings_and_paths_that_do_not_change_the_result_may_change_on_resuming(
    settings, finished, run, recipe, data, tmp_path
):
    moved = shutil.copytree(data, tmp_path / "moved")
    shutil.rmtree(run / "checkpoint-2")
    settings = [setting.format(moved=moved) for setting in settings]
    assert train.main([str(recipe), "resume=true", *settings]) == 0
    assert files_in(run)["model.safetensors"] == files_in(finished)["model.safetensors"]


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(finished, run, recipe, caplog):
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-1" / "mfuser_run.json").unlink()
    assert train.main([str(recipe), "resume=true"]) == 0
    assert files_in(run)["model.safetensors"] == files_in(finished)["model.safetensors"]


# --- a longer run ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["polynomial", "cosine"])
def test_a_run_that_is_extended_has_the_learning_rates_of_its_new_length(recipe, tmp_path, scheduler):
    common = [str(recipe), f"lr_scheduler_type={scheduler}", "eval_strategy=no", "warmup_steps=1"]
    assert train.main([*common, "max_steps=3", "save_steps=3"]) == 0
    assert train.main([*common, "max_steps=6", "save_steps=6", "resume=true"]) == 0

    def rates(folder):
        state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
        return {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}

    logged = rates(tmp_path / "run")
    assert sorted(logged) == [1, 2, 3, 4, 5, 6]
    if scheduler == "cosine":
        expected = [0.5 * (1 + math.cos(math.pi * (step - 1) / 5)) for step in (3, 4, 5)]  # 5 steps after the warm-up
    else:
        expected = [PolynomialSchedule(1e-3, 1e-6, 6, 1)(step) for step in (3, 4, 5)]
        lengths = json.loads((tmp_path / "run" / "mfuser_run.json").read_text())["lengths"]
        assert [(each["from_step"], each["max_steps"]) for each in lengths] == [(0, 3), (3, 6)]
        assert "extended at step 3 from 3 to 6 steps" in (tmp_path / "run" / "README.md").read_text()
    assert [logged[step] for step in (4, 5, 6)] == [pytest.approx(1e-3 * rate) for rate in expected]


# --- two runs at once ------------------------------------------------------------------------------------------------


def hold_lock(folder, ready):
    with locked(folder):
        ready.set()
        signal.pause()


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_blocks_nothing(recipe, tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold_lock, args=(tmp_path / "run", ready))
    other.start()
    ready.wait()
    try:
        assert train.main([str(recipe)]) == 2
        assert "in which another run is training; give another folder" in message_of(capsys)
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert train.main([str(recipe), "max_steps=1", "eval_strategy=no"]) == 0


# --- damaged checkpoints ---------------------------------------------------------------------------------------------

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "mfuser_run.json"]


CASES = [(name, damage) for name in FILES for damage in ("half", "text", "gone")]
FAST = [("optimizer.pt", "half"), ("trainer_state.json", "text"), ("mfuser_run.json", "gone")]


@pytest.mark.parametrize(
    ("name", "damage"), [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_a_damaged_checkpoint_ends_with_one_line_that_names_it_and_is_kept(name, damage, run, recipe, capsys):
    shutil.rmtree(run / "checkpoint-2")
    file = run / "checkpoint-1" / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "half" else b"not this")
    before = files_in(run)
    code = train.main([str(recipe), "resume=true"])
    shown = capsys.readouterr().err
    if damage == "gone" and name == "mfuser_run.json":
        assert code == 0  # a checkpoint of an earlier version
        return
    assert code == 2
    assert "checkpoint-1" in shown.rpartition("mfuser train: ")[2] and "Traceback" not in shown
    assert files_in(run) == before
