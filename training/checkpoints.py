"""Weights and folders of checkpoints: loading by Transformers' Trainer, and atomic saving."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_utils import sort_checkpoints

from mfuser.files import flush
from mfuser.frozen_encoders_mfuser import ENCODERS_FILE
from mfuser.loading import read_weights

# Temporary folders next to the results of a run. Uploads to the Hub leave out names that begin with an underscore.
UNFINISHED_FOLDER = "_unfinished"  # checkpoints and results while they are written
REPLACED_FOLDER = "_replaced"  # checkpoints while others replace them
DISCARDED_FOLDER = "_discarded"  # checkpoints while they are deleted
LOCK_FILE = "_lock"
CONFIG_FILE = "config.json"
# Files that remain if the same model was saved in another way before.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", ENCODERS_FILE)


def accept_saved_names(model: PreTrainedModel) -> RemovableHandle:
    """
    Makes `model.load_state_dict` accept the content of weights files, whose names differ from those in memory.

    [`Trainer`] resumes and loads the best model by `load_state_dict(..., strict=False)`. With this hook every tensor
    is restored, with the checks of [`~mfuser.loading.read_weights`]. A complete state dict with the names in memory
    is loaded unchanged.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model that receives the hook.

    Returns:
        `torch.utils.hooks.RemovableHandle`: A handle that removes the hook.
    """
    return model.register_load_state_dict_pre_hook(_translate_names)


def _translate_names(model: PreTrainedModel, state_dict: dict, *unused) -> None:
    if state_dict.keys() != model.state_dict().keys():
        complete = read_weights(model, state_dict=dict(state_dict))
        state_dict.clear()
        state_dict.update(complete)


# --- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """
    Removes a folder of unfinished files before and after the block, so that they do not fill the disk.

    Raises:
        OSError: If PyTorch cannot write a file, for which it raises a `RuntimeError`.
    """
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while saving
    try:
        yield
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(f"a file in {folder} cannot be written; is the disk full? ({error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(unfinished: Path, final: Path) -> None:
    """
    Renames a finished checkpoint to its final name, and replaces an earlier one of that name.

    At any time, the earlier or the new checkpoint is complete: see [`restore_replaced`].

    Args:
        unfinished (`Path`):
            The finished folder, on the same file system.
        final (`Path`):
            Its final path.
    """
    flush(unfinished)
    replaced = final.parent / REPLACED_FOLDER
    if final.exists():
        replaced.mkdir(exist_ok=True)
        os.replace(final, replaced / final.name)
    os.replace(unfinished, final)
    if replaced.exists():
        discard(replaced)


def restore_replaced(folder: Path) -> None:
    """Restores the names of checkpoints of a run that was killed while [`publish`] replaced them."""
    for earlier in sorted((folder / REPLACED_FOLDER).glob("*")):
        if not (folder / earlier.name).exists():
            os.replace(earlier, folder / earlier.name)
    for name in (REPLACED_FOLDER, DISCARDED_FOLDER, UNFINISHED_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def discard(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a run that is killed leaves no half-deleted checkpoint."""
    discarded = folder.parent / DISCARDED_FOLDER
    shutil.rmtree(discarded, ignore_errors=True)
    os.replace(folder, discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """
    Deletes the oldest checkpoints, as Transformers' `rotate_checkpoints` does.

    Args:
        folder (`Path`):
            The folder of the run.
        limit (`int`, *optional*):
            The number of checkpoints to keep. The last and the best are kept in any case.
        best (`str`, *optional*):
            The best checkpoint.
    """
    if not limit:
        return
    checkpoints = sort_checkpoints(str(folder), use_mtime=True)
    kept = {checkpoints[-1], *([str(Path(best))] if best else [])}
    superfluous = len(checkpoints) - max(limit, len(kept))
    for checkpoint in [each for each in checkpoints if each not in kept][: max(superfluous, 0)]:
        discard(Path(checkpoint))


def publish_files(unfinished: Path, folder: Path) -> None:
    """
    Moves the files of a finished model into a folder that may hold an earlier one.

    Every file is replaced atomically. `config.json`, without which the folder is not a model, is the last.

    Args:
        unfinished (`Path`):
            The folder of the finished files, on the same file system. It is removed.
        folder (`Path`):
            The folder that they are moved to.
    """
    flush(unfinished)
    names = sorted((path.name for path in unfinished.iterdir()), key=lambda name: (name == CONFIG_FILE, name))
    for name in names:
        os.replace(unfinished / name, folder / name)
    for stale in [path for pattern in WEIGHTS for path in folder.glob(pattern) if path.name not in names]:
        stale.unlink()
    shutil.rmtree(unfinished, ignore_errors=True)


# --- weights ---------------------------------------------------------------------------------------------------------


def without_scalars(model: nn.Module) -> list[str]:
    """Gives `model`'s scalar parameters one dimension, since FSDP cannot shard scalars, and returns their names."""
    names = [name for name, weight in model.named_parameters() if weight.dim() == 0]
    for name in names:
        module, _, attribute = name.rpartition(".")
        weight = getattr(model.get_submodule(module), attribute)
        one_dimensional = nn.Parameter(weight.detach().reshape(1), requires_grad=weight.requires_grad)
        setattr(model.get_submodule(module), attribute, one_dimensional)
    return names


__all__ = [
    "LOCK_FILE",
    "UNFINISHED_FOLDER",
    "accept_saved_names",
    "discard",
    "publish",
    "publish_files",
    "restore_replaced",
    "rotate",
    "unfinished",
    "without_scalars",
]
