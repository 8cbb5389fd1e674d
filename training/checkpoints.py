"""Weights and folders of checkpoints: what Transformers' Trainer loads from them and how they become visible."""

import os
import shutil
from pathlib import Path

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mfuser.loading import read_weights

# Checkpoints are written in this folder. Uploads to the Hub leave out names that begin with an underscore.
UNFINISHED_FOLDER = "_unfinished"


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


def publish(unfinished: Path, final: Path) -> None:
    """Flushes the files of a folder to disk, then renames it, in place of a folder `final` from an earlier run."""
    for file in filter(Path.is_file, unfinished.rglob("*")):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(unfinished, final)


def without_scalars(model: nn.Module) -> list[str]:
    """Gives `model`'s scalar parameters one dimension, since FSDP cannot shard scalars, and returns their names."""
    names = [name for name, weight in model.named_parameters() if weight.dim() == 0]
    for name in names:
        module, _, attribute = name.rpartition(".")
        weight = getattr(model.get_submodule(module), attribute)
        one_dimensional = nn.Parameter(weight.detach().reshape(1), requires_grad=weight.requires_grad)
        setattr(model.get_submodule(module), attribute, one_dimensional)
    return names


__all__ = ["UNFINISHED_FOLDER", "accept_saved_names", "publish", "without_scalars"]
