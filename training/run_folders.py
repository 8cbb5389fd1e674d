"""The folder of a run: it is used by one run at a time, and no run overwrites the results of another."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from mfuser.training.checkpoints import CONFIG_FILE, LOCK_FILE, REPLACED_FOLDER, WEIGHTS, discard
from mfuser.training.run_record import RECORD_FILE

# The parts of a checkpoint. DeepSpeed and FSDP save some of them in folders.
PARTS = {
    "weights": ("*.safetensors", "global_step*", "pytorch_model*"),
    "state of the optimizer": ("optimizer*", "global_step*"),
    "state of the schedule": ("scheduler.pt", "global_step*"),
    "state of the random numbers": ("rng_state*.pth",),
    "state of the run": (TRAINER_STATE_NAME,),
}
# Files that a run writes into its folder in addition to checkpoints and weights.
RESULTS = (CONFIG_FILE, RECORD_FILE, TRAINER_STATE_NAME, "training_args.bin", "preprocessor_config.json", "README.md")


def content(folder: Path) -> list[str]:
    """The names in a folder, without those that begin with a dot or an underscore."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] not in "._") if folder.is_dir() else []


def results(folder: Path) -> list[str]:
    """The names of the files in a folder that a run replaces or deletes at its end."""
    return sorted(path.name for pattern in (*RESULTS, *WEIGHTS) for path in folder.glob(pattern))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Locks the folder of a run while the block runs. The operating system releases the lock of a killed process.

    Raises:
        ValueError: If another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"output_dir is {folder}, in which another run is training; give another folder") from error
    try:
        yield
    finally:
        lock.release()


def check_output_dir(folder: Path, resume: str | bool, overwrite: bool) -> None:
    """
    Checks that a run loses no results of another one.

    Args:
        folder (`Path`):
            The folder of the run.
        resume (`str` or `bool`):
            A checkpoint to continue from, or whether to continue from the last one in `folder` if there is one.
        overwrite (`bool`):
            Whether the run may replace another run's results in `folder`.

    Raises:
        ValueError: If the folder holds files of another run, or there is no such checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir is {folder}, which is a file; it must be a folder")
    names = content(folder)
    if resume is not False and overwrite:
        raise ValueError(
            f"resume is {resume} and overwrite_output_dir is true; a run continues an earlier one or replaces it"
        )
    checkpoints = [*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *folder.glob(f"{REPLACED_FOLDER}/*")]
    found = results(folder)
    if isinstance(resume, str):
        if not Path(resume, TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"resume is {resume}, which has no {TRAINER_STATE_NAME}; it must be true, false or a checkpoint"
            )
        if names and folder.resolve() not in Path(resume).resolve().parents:
            raise ValueError(
                f"output_dir is {folder}, which holds {names[0]}, and the checkpoint {resume} is not in it; give an "
                "empty output_dir"
            )
    elif resume:
        if found and not checkpoints:
            raise ValueError(
                f"output_dir is {folder}, which holds {found[0]} but no checkpoint to resume from; give an empty "
                "folder"
            )
    elif overwrite:
        if found and not checkpoints and RECORD_FILE not in names:
            raise ValueError(
                f"output_dir is {folder}, whose {found[0]} was not written by `mfuser train`; give another folder"
            )
    elif names:
        raise ValueError(
            f"output_dir is {folder}, which is not empty: it holds {names[0]}; resume=true continues a run, "
            "overwrite_output_dir=true deletes its checkpoints and its model, and another output_dir keeps them"
        )


def checkpoint_to_resume(folder: Path, resume: str | bool) -> str | None:
    """The checkpoint that `resume` names, or for `True` the last one in the folder if there is one."""
    if isinstance(resume, str):
        return resume
    return get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None


def check_checkpoint(checkpoint: str | Path) -> None:
    """
    Checks that a checkpoint is complete and that none of its files is truncated.

    Trainer would continue without the state of the optimizer or of the random numbers if their files were missing.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    folder = Path(checkpoint)
    for kind, patterns in PARTS.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ValueError(f"{folder} cannot be resumed: it holds no {kind} ({' or '.join(patterns)})")
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in (".pt", ".pth"):  # archives whose directory is at the end
                with ZipFile(file):
                    pass
        except (ValueError, SafetensorError, BadZipFile) as error:
            raise ValueError(
                f"{folder} cannot be resumed: {file.name} is damaged ({error}); name an earlier checkpoint by resume"
            ) from error


def remove_earlier_run(folder: Path) -> None:
    """Deletes the checkpoints and the results of an earlier run. Other files are kept."""
    for checkpoint in sort_checkpoints(str(folder)):
        discard(Path(checkpoint))
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # first: without it, the rest is not a model
    for name in results(folder):
        (folder / name).unlink()


__all__ = ["check_checkpoint", "check_output_dir", "checkpoint_to_resume", "locked", "remove_earlier_run"]
