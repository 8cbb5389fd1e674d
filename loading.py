"""Loading of saved models, both complete ones and those saved without their frozen encoders."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from mfuser.errors import one_line
from mfuser.files import read_json
from mfuser.frozen_encoders_mfuser import recorded_encoders, saved_weights
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.pretrained_mfuser import check_finite

# Fields of a configuration that name the software and the location of the model.
CONFIG_NOTES = ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype")


def load_model(
    name_or_path: str | Path, dtype: str | torch.dtype = "auto", **config_fields
) -> MFuserForSemanticSegmentation:
    """
    Loads a saved model, in eval mode on the CPU.

    A model that was saved without its encoders is loaded on top of those that its `encoders.json` names.

    Args:
        name_or_path (`str` or `Path`):
            Folder or Hub id of an MFuser model.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Data type of the weights; `"auto"` keeps the one they were saved in.
        config_fields:
            Fields of the model's [`MFuserConfig`] to change.

    Returns:
        [`MFuserForSemanticSegmentation`]: The model.

    Raises:
        OSError: If there is no such model, or an encoder that it was saved without cannot be found.
        ValueError: If it is not an MFuser model, a file of it is damaged, weights are missing, of another shape or not
            finite, or an encoder is not the recorded one.
    """
    name_or_path = str(name_or_path)
    with _naming_damaged_files(name_or_path):
        return _load_model(name_or_path, dtype, config_fields)


def config_content(config: PreTrainedConfig) -> dict:
    """The fields of a configuration, without those that name the software and the location of the model."""
    return _content(config.to_dict())


def _content(fields: dict) -> dict:
    return {
        name: _content(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in CONFIG_NOTES
    }


@contextmanager
def _naming_damaged_files(folder: str) -> Iterator[None]:
    """Replaces errors of libraries that do not name the invalid file."""
    for file in Path(folder).glob("*.json") if Path(folder).is_dir() else ():
        read_json(file)
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{folder}: its configuration is invalid: {one_line(error)}") from error
    except (SafetensorError, RuntimeError) as error:
        for file in sorted(Path(folder).glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as damage:
                raise ValueError(
                    f"{file} is damaged or not a safetensors file ({one_line(damage)}); copy or download it again"
                ) from error
        raise


def _load_model(name_or_path: str, dtype: str | torch.dtype, config_fields: dict) -> MFuserForSemanticSegmentation:
    model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    if model_type is None:
        raise ValueError(f"{name_or_path} holds no model: its config.json is missing or names no model type.")
    if model_type != "mfuser":
        raise ValueError(f"{name_or_path} holds a model of type {model_type!r}, not 'mfuser'.")
    # Weights of another shape are reported below, unless the caller asks for other classes.
    other_classes = {"id2label", "num_labels", "config"} & set(config_fields)
    model, report = MFuserForSemanticSegmentation.from_pretrained(
        name_or_path,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=not other_classes,
        **config_fields,
    )
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise ValueError(
            f"{name_or_path}: {len(report['mismatched_keys'])} of its weights do not fit its config.json, such as "
            f"{name} of shape {tuple(found)}, which must be {tuple(wanted)}."
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{name_or_path} lacks {len(missing)} of the model's weights, such as {missing[0]}.")
    return model


def load_for_inference(
    name_or_path: str | Path,
    device: torch.device,
    dtype: str | None = None,
    size: dict[str, int] | None = None,
) -> tuple[MFuserForSemanticSegmentation, MFuserImageProcessor]:
    """
    Loads a saved model onto `device`, and its image processor.

    Args:
        name_or_path (`str` or `Path`):
            Folder or Hub id of an MFuser model, see [`load_model`].
        device (`torch.device`):
            Where the model runs.
        dtype (`str`, *optional*):
            Data type of the weights; by default the one they were saved in.
        size (`dict[str, int]`, *optional*):
            Size that images are resized to; by default the one saved with the image processor.

    Returns:
        `tuple`: The [`MFuserForSemanticSegmentation`] in eval mode and the [`MFuserImageProcessor`].
    """
    model = load_model(name_or_path, dtype or "auto")
    with _naming_damaged_files(str(name_or_path)):
        processor = MFuserImageProcessor.from_pretrained(name_or_path, **({} if size is None else {"size": size}))
    # The encoders' tokens become feature maps without a copy if channels come last.
    return model.to(device, memory_format=torch.channels_last).eval(), processor


def saved_encoders(name_or_path: str | Path) -> dict[str, str] | None:
    """Folder or Hub id of the `vfm` and `vlm` that a model was saved without; `None` for a model saved whole."""
    entries = recorded_encoders(name_or_path)
    return None if entries is None else {key: entry["name_or_path"] for key, entry in entries.items()}


def read_weights(
    model: PreTrainedModel, folder: str | Path | None = None, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    Translates saved weights to the names that they have in memory, and checks that none is missing.

    The names of tensors in files differ from those in memory. `from_pretrained` translates them; `load_state_dict`
    does not, and with `strict=False` it would skip the encoders' weights.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model that the weights are for. It is not changed.
        folder (`str` or `Path`, *optional*):
            Folder of a saved model.
        state_dict (`dict`, *optional*):
            The content of its weights file, instead of `folder`.

    Returns:
        `dict`: A complete state dict of `model`. Frozen weights that were not saved are the model's own.

    Raises:
        ValueError: If weights that are not frozen are missing, or if weights are unexpected, of another shape or not
            finite.
    """
    if folder is not None:
        state_dict = saved_weights(folder)
        check_finite(state_dict, str(folder))
    loaded, report = type(model).from_pretrained(
        None,
        state_dict=state_dict,
        config=copy.deepcopy(model.config),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    problems = {
        "missing": sorted(set(report["missing_keys"]) - frozen),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(name for name, *_ in report["mismatched_keys"]),
    }
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"The weights in {folder or 'the checkpoint'} do not fit the model; {listed}")
    own = model.state_dict()
    return loaded.state_dict() | {name: own[name] for name in report["missing_keys"]}


def restore_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Loads the weights saved in `folder` into `model`, with the checks of [`read_weights`]."""
    model.load_state_dict(read_weights(model, folder))


__all__ = ["load_for_inference", "load_model", "read_weights", "restore_weights", "saved_encoders"]
