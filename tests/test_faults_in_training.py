"""No complete file is lost if the process is killed at any file operation, or the disk is full from any write on."""

import hashlib
import shutil
import signal
from pathlib import Path

import fault_injection
import pytest
import torch
from fault_injection import FINISHED, FULL, fill_disk, kill
from test_training import trainer_in

from mfuser import MFuserForSemanticSegmentation
from mfuser.training.checkpoints import restore_replaced, rotate
from mfuser.training.run_folders import remove_earlier_run


def files_in(folder: Path) -> dict[str, str]:
    """The hash of every file, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def part(files: dict[str, str], name: str) -> dict[str, str]:
    return {path: digest for path, digest in files.items() if path.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer at step 4 whose folder holds two checkpoints and a result."""
    trainer = trainer_in(tmp_path_factory.mktemp("run"), save_total_limit=2)
    trainer.train()
    trainer.save_model()
    return trainer


def save_again(trainer):
    trainer._save_checkpoint(trainer.model, None)


def save_later(trainer):
    trainer.state.global_step = 6  # checkpoint-2 is deleted, since two are kept
    trainer._save_checkpoint(trainer.model, None)


def save_result(trainer):
    with torch.no_grad():
        trainer.model.decoder.query_position_embedding += 1
    trainer.save_model()


ACTIONS = {"a checkpoint of the same step": save_again, "a checkpoint": save_later, "the result": save_result}


def faults(step: int):
    """Every `step`-th number of a fault; the slow tests try some of them, the exhaustive ones all."""
    return range(0, 500, step)


def check(action, trainer, tmp_path, fault, step):
    """Injects one fault after another until the action has no further file operation; returns the last number."""
    original = Path(trainer.args.output_dir)
    before = files_in(original)
    run = tmp_path / "run"
    for number in faults(step):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(original, run)

        @fault_injection.full_disk_is_an_exit_code
        def act():
            trainer.args.output_dir = str(run)
            action(trainer)

        code, _ = fault_injection.run(act, run, fault, number)
        assert code in (FINISHED, -signal.SIGKILL if fault is kill else FULL)
        if code == FULL:
            assert not (run / "_unfinished").exists()  # the disk space is freed
        restore_replaced(run)  # as the next run does
        after = files_in(run)
        for path in run.glob("checkpoint-*"):
            names = {file.partition("/")[2] for file in part(after, path.name)}
            assert names == {file.partition("/")[2] for file in part(before, "checkpoint-4")}, (number, path)
        assert part(after, "checkpoint-4").keys() == part(before, "checkpoint-4").keys(), number
        if action is not save_later:
            assert part(after, "checkpoint-2") == part(before, "checkpoint-2"), number
        assert not [file for file in after if file.startswith("_")], number
        result = MFuserForSemanticSegmentation.from_pretrained(run)
        moved = (result.decoder.query_position_embedding - trainer.model.decoder.query_position_embedding).detach()
        assert set(moved.unique().tolist()) in ({0.0}, {1.0}) or moved.allclose(torch.ones(())), number
        if code == FINISHED:
            return number
    raise AssertionError("the action never finished")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kill, fill_disk])
@pytest.mark.parametrize("action", ACTIONS)
def test_no_complete_file_is_lost(action, fault, trainer, tmp_path):
    check(ACTIONS[action], trainer, tmp_path, fault, step=23)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("fault", [kill, fill_disk])
@pytest.mark.parametrize("action", ACTIONS)
def test_no_complete_file_is_lost_at_any_file_operation(action, fault, trainer, tmp_path):
    assert check(ACTIONS[action], trainer, tmp_path, fault, step=1) > 10


@pytest.mark.slow
def test_deleting_checkpoints_leaves_no_partial_checkpoint(trainer, tmp_path):
    original = Path(trainer.args.output_dir)
    whole = {path.partition("/")[2] for path in part(files_in(original), "checkpoint-4")}
    for action in (lambda: rotate(tmp_path / "run", 1, None), lambda: remove_earlier_run(tmp_path / "run")):
        for number in range(0, 400, 13):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(original, tmp_path / "run")
            act = fault_injection.full_disk_is_an_exit_code(action)
            code, _ = fault_injection.run(act, tmp_path / "run", kill, number)
            for path in (tmp_path / "run").glob("checkpoint-*"):
                assert {file.name for file in path.iterdir()} == whole
            if code == FINISHED:
                break
        else:
            raise AssertionError("the action never finished")
