"""
Models saved without their frozen encoders. A file names the encoders, which are loaded from their original location.

An MFuser is trained on top of public encoders that do not change. A folder without them has a fifth of the size.
"""

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .class_names_mfuser import hub_arguments
from .files import sha256, write_text
from .pretrained_mfuser import PretrainedEncoders, load_pretrained_encoders, tower_weights
from .towers_mfuser import VFM_TOWERS, VLM_TOWERS

logger = logging.get_logger(__name__)

# Saved next to weights without the frozen encoders: the location of each encoder, and the hashes of its weights.
ENCODERS_FILE = "encoders.json"
ENCODERS = {"vfm": "vision foundation model", "vlm": "vision-language model"}


def recorded_encoders(name_or_path: str | Path, **hub_kwargs) -> dict[str, dict] | None:
    """
    The encoders that a model was saved without.

    Args:
        name_or_path (`str` or `Path`):
            Folder or Hub id of the model.
        hub_kwargs:
            Arguments for the download, such as `revision`.

    Returns:
        `dict[str, dict]`, *optional*: For `vfm` and `vlm`, the `name_or_path`, the `revision` (of a Hub id) and the
        SHA-256 of each weights file (`sha256`). `None` for a model saved whole.
    """
    try:
        file = cached_file(str(name_or_path), ENCODERS_FILE, **hub_kwargs)
    except OSError:  # no such file, or no such model
        return None
    entries = json.loads(Path(file).read_text(encoding="utf-8"))
    # Earlier versions recorded names alone.
    return {key: entry if isinstance(entry, dict) else {"name_or_path": entry} for key, entry in entries.items()}


def located(name: str, **hub_kwargs) -> tuple[Path, str | None]:
    """The folder of a model given by its folder or Hub id, and the commit of a Hub id; downloads its `config.json`."""
    if Path(name).is_dir():
        return Path(name), None
    folder = Path(hf_hub_download(name, "config.json", **hub_kwargs)).parent
    return folder, folder.name  # in the cache of the Hub, the folder of a snapshot is named after its commit


def write_encoders_file(folder: str | Path, encoders: Mapping[str, Mapping]) -> None:
    """Writes the encoders that [`checked_encoders`] returned next to the weights of a model."""
    write_text(Path(folder, ENCODERS_FILE), json.dumps(encoders, indent=2) + "\n")


def load_named_encoders(encoders: Mapping[str, Any], **hub_kwargs) -> tuple[PretrainedEncoders, dict[str, dict]]:
    """
    Loads both encoders, and compares their weights files with the hashes that are known.

    Args:
        encoders (`dict`):
            For `vfm` and `vlm`, a folder or Hub id, or an entry of [`recorded_encoders`].
        hub_kwargs:
            Arguments for the download, such as `cache_dir`.

    Returns:
        `tuple`: The [`PretrainedEncoders`], and the entries for [`recorded_encoders`] that describe them.

    Raises:
        OSError: If an encoder cannot be found.
        ValueError: If an encoder is not named, has other weights than those recorded, or is of another kind.
    """
    if encoders.keys() != ENCODERS.keys():
        raise ValueError(f"encoders names {', '.join(map(repr, encoders)) or 'nothing'}; it must name 'vfm' and 'vlm'")
    known = {key: given if isinstance(given, Mapping) else {} for key, given in encoders.items()}
    names = {key: _name(given) for key, given in encoders.items()}
    revisions = {key: entry.get("revision") for key, entry in known.items()}
    pretrained = load_pretrained_encoders(**names, revisions=revisions, **hub_kwargs)
    entries = {}
    for key, name in names.items():
        folder, revision = located(name, revision=revisions[key], **hub_kwargs)
        hashes = {file.name: sha256(file) for file in _weights_files(folder)}
        expected = known[key].get("sha256", hashes)
        if hashes != expected:
            raise ValueError(
                f"the {ENCODERS[key]} {name} is not the one that the model was trained with: the SHA-256 of its "
                f"weights is {_listed(hashes)}; it must be {_listed(expected)}"
            )
        entries[key] = {
            "name_or_path": str(folder.resolve()) if revision is None else name,
            "revision": revision,
            "sha256": hashes,
        }
    return pretrained, entries


def _name(encoder: str | Mapping[str, Any]) -> str:
    return str(encoder["name_or_path"] if isinstance(encoder, Mapping) else encoder)


def _weights_files(folder: Path) -> list[Path]:
    """The files in an encoder's folder that Transformers loads the weights from, in its order of preference."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            if not name.endswith(".index.json"):
                return [folder / name]
            shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
    return []


def _listed(hashes: Mapping[str, str]) -> str:
    return ", ".join(f"{digest} ({name})" for name, digest in hashes.items())


# --- saving ----------------------------------------------------------------------------------------------------------


def frozen_encoders(model: PreTrainedModel) -> list[str]:
    """The keys of `vfm` and `vlm`, of those encoders that have no trainable weight."""
    return [
        key
        for key in ENCODERS
        if not any(weight.requires_grad for weight in getattr(model.base_model, key).parameters())
    ]


def weights_without_encoders(
    model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The state dict of a model, or `state_dict`, without the weights of the encoders that are frozen."""
    inner = "" if model.base_model is model else f"{model.base_model_prefix}."
    left_out = tuple(f"{inner}{key}." for key in frozen_encoders(model))
    state_dict = model.state_dict() if state_dict is None else state_dict
    return {name: weight for name, weight in state_dict.items() if not name.startswith(left_out)}


@torch.no_grad()
def checked_encoders(model: PreTrainedModel, encoders: Mapping[str, Any] | None = None) -> dict[str, dict]:
    """
    Describes the encoders of a model, after checking that its frozen weights equal those of the encoders.

    Args:
        model ([`MFuserPreTrainedModel`]):
            The model.
        encoders (`dict`, *optional*):
            Folder or Hub id of its `vfm` and `vlm`. Defaults to those that the model was built from or loaded with.

    Returns:
        `dict[str, dict]`: See [`recorded_encoders`].

    Raises:
        ValueError: If the encoders are unknown, or the weights of the model differ from theirs.
    """
    encoders = encoders or model.encoders
    if not encoders:
        raise ValueError(
            "the model would be saved without its frozen encoders, but their origin is unknown; give "
            "encoders={'vfm': ..., 'vlm': ...}, the folders or Hub ids that it was built from, or save it whole"
        )
    pretrained, entries = load_named_encoders(encoders)
    expected, _ = tower_weights(model.base_model, pretrained)
    for key in frozen_encoders(model):
        different = [
            name
            for name, weight in getattr(model.base_model, key).named_parameters(prefix=key)
            if weight.device.type != "meta" and not _close(weight, expected[name])
        ]
        if different:
            raise ValueError(
                f"the model's {ENCODERS[key]} is not {entries[key]['name_or_path']}: {len(different)} of its weights "
                f"differ, such as {different[0]}; name the one that it was built from, or save the model whole"
            )
    return entries


def _close(weight: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two weights are equal up to the rounding of their resampling and of the model's data type."""
    if not weight.is_floating_point():  # quantised
        return False
    tolerance = max(1e-5, torch.finfo(weight.dtype).eps)
    return torch.allclose(weight.cpu().float(), expected.float(), rtol=tolerance, atol=tolerance / 10)


# --- loading ---------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Both encoders of an [`MFuserModel`], on the meta device, for the names and shapes of their weights."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        with torch.device("meta"):
            self.vfm = VFM_TOWERS[config.vfm_config.model_type](config)
            self.vlm = VLM_TOWERS[config.vlm_config.model_type](config)


def saved_weights(name_or_path: str | Path, variant: str | None = None, **hub_kwargs) -> dict[str, torch.Tensor]:
    """The tensors in the weights files of a saved model, with the names that they have there."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if variant is not None:
        names = tuple(name.replace(".safetensors", f".{variant}.safetensors") for name in names)
    try:
        files = [cached_file(str(name_or_path), names[0], **hub_kwargs)]
    except OSError:  # several files, or none
        index = cached_file(str(name_or_path), names[1], **hub_kwargs)
        files, _ = get_checkpoint_shard_files(str(name_or_path), index, **hub_kwargs)
    return {name: tensor for file in files for name, tensor in load_state_dict(file).items()}


class ModelWithFrozenEncoders(PreTrainedModel):
    """
    A [`PreTrainedModel`] that is saved without its frozen encoders where requested, and loads such folders.

    `encoders` names the pretrained encoders that the model was built from or loaded with, if they are known.
    """

    encoders: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, encoders: Mapping[str, Any] | None = None, **kwargs
    ):
        """
        See [`PreTrainedModel.from_pretrained`].

        If the folder was saved without encoders, these are loaded from where its `encoders.json` says.

        Args:
            encoders (`dict[str, str]`, *optional*):
                Other folders or Hub ids of the same `vfm`, `vlm` or both. Their weights must have the recorded hashes.

        Raises:
            OSError: If an encoder cannot be found.
            ValueError: If an encoder has other weights than those that the model was trained with.
        """
        path, wants_report = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        hub_kwargs = hub_arguments(kwargs)
        known = None
        if path is not None and kwargs.get("state_dict") is None:
            known = recorded_encoders(path, **hub_kwargs)
        if encoders is not None:
            known = _with_other_names(known or {}, encoders)
        if known is None:
            model, report = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
            _check_encoders_are_present(model, report, path)
            return (model, report) if wants_report else model
        kwargs["config"] = config = _loaded_config(cls.config_class, path, hub_kwargs, kwargs)
        state_dict = saved_weights(path, kwargs.pop("variant", None), **hub_kwargs)
        prefix = f"{cls.base_model_prefix}."
        prefix = prefix if any(name.startswith(prefix) for name in state_dict) else ""
        lacking = [key for key in ENCODERS if not any(name.startswith(f"{prefix}{key}.") for name in state_dict)]
        if lacking:
            weights, known = _weights_of_encoders(config, known, path, hub_kwargs)
            kept = tuple(f"{key}." for key in lacking)
            state_dict |= {f"{prefix}{name}": weight for name, weight in weights.items() if name.startswith(kept)}
        elif encoders is not None:
            raise ValueError(f"{path} holds the weights of its encoders; encoders must not be given")
        kwargs |= {"state_dict": state_dict, "output_loading_info": True}
        model, report = super().from_pretrained(None, *args, **kwargs)
        model.config.name_or_path = model.name_or_path = str(path)
        model.encoders = known
        return (model, report) if wants_report else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        trainable_only: bool = False,
        encoders: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        """
        See [`PreTrainedModel.save_pretrained`].

        Args:
            trainable_only (`bool`, *optional*, defaults to `False`):
                Whether to leave out frozen encoders. `encoders.json` then names them, and the folder loads like any
                other where they can be found.
            encoders (`dict[str, str]`, *optional*):
                Folder or Hub id of the `vfm` and `vlm`, for `trainable_only`. Defaults to those that the model was
                built from or loaded with.

        Raises:
            ValueError: If encoders would be left out that are unknown or have been changed.
        """
        if not trainable_only:
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
            return
        if not self.config.use_vfm:
            raise ValueError("use_vfm is False; trainable_only is for models with both encoders, save this one whole")
        hub_kwargs = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "create_pr") if name in kwargs
        }
        entries = checked_encoders(self, encoders) if frozen_encoders(self) else None
        state_dict = weights_without_encoders(self, state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        if is_main_process and entries is not None:
            write_encoders_file(save_directory, entries)
        if push_to_hub and is_main_process:
            hub_kwargs.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub_kwargs, token=kwargs.get("token"), trainable_only=True, encoders=encoders)

    def push_to_hub(
        self, repo_id: str, *, trainable_only: bool = False, encoders: Mapping[str, Any] | None = None, **kwargs
    ) -> str:
        """See [`PreTrainedModel.push_to_hub`]; for `trainable_only` and `encoders`, see `save_pretrained`."""
        if not trainable_only:
            return super().push_to_hub(repo_id, **kwargs)
        for name in map(_name, (encoders or self.encoders or {}).values()):
            if Path(name).is_dir():
                logger.warning(f"{ENCODERS_FILE} names the local folder {name}, which others do not have")
        uploaded: Any = copy.copy(self)
        uploaded.save_pretrained = partial(self.save_pretrained, trainable_only=True, encoders=encoders)
        return super(ModelWithFrozenEncoders, uploaded).push_to_hub(repo_id, **kwargs)


def _with_other_names(known: Mapping[str, dict], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded encoders, at other locations."""
    if unknown := encoders.keys() - ENCODERS.keys():
        raise ValueError(f"encoders names {', '.join(sorted(unknown))}; it can name 'vfm' and 'vlm'")
    moved = {
        key: {**known.get(key, {}), "name_or_path": str(name), "revision": None} for key, name in encoders.items()
    }
    if unchecked := [key for key, entry in moved.items() if "sha256" not in entry]:
        logger.warning(f"no hashes of {' and '.join(unchecked)} were saved; the given weights are used unchecked")
    return {**known, **moved}


def _loaded_config(
    config_class: type[PreTrainedConfig], path, hub_kwargs: Mapping[str, Any], kwargs: dict[str, Any]
) -> PreTrainedConfig:
    """The configuration of a saved model; takes its fields out of `kwargs`, as `from_pretrained` does."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    source = path if config is None else config
    config = config_class.from_pretrained(source, **hub_kwargs)
    names = [name for name in kwargs if hasattr(config, name) and name not in ("dtype", "torch_dtype")]
    fields = {name: kwargs.pop(name) for name in names}
    return config_class.from_pretrained(source, **hub_kwargs, **fields) if fields else config


def _weights_of_encoders(
    config: PreTrainedConfig, known: Mapping[str, Any], path, hub_kwargs: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """The weights of both encoders by their names in the model, and the entries that describe the encoders."""
    downloads = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
    try:
        pretrained, entries = load_named_encoders(known, **downloads)
        weights, _ = tower_weights(Towers(config), pretrained)
    except (OSError, ValueError) as error:
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"{path} was saved without its encoders, and these cannot be loaded: {error}. If they are elsewhere, give "
            "encoders={'vfm': ..., 'vlm': ...}"
        ) from error
    return weights, entries


def _check_encoders_are_present(model: PreTrainedModel, report: Mapping[str, Any], path) -> None:
    """Raises `ValueError` if a saved model has no weights of an encoder, which would be initialised at random."""
    inner = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = set(report["missing_keys"])
    for key in ENCODERS:
        weights = {name for name, _ in getattr(model.base_model, key).named_parameters(prefix=f"{inner}{key}")}
        if path is not None and weights and weights <= missing:  # none with `use_vfm=False`
            raise ValueError(
                f"{path} lacks the weights of the {ENCODERS[key]}, and has no {ENCODERS_FILE} that says where they "
                "are: give encoders={'vfm': ..., 'vlm': ...}, the folders or Hub ids that it was trained with"
            )


__all__ = ["ENCODERS_FILE", "ModelWithFrozenEncoders"]
