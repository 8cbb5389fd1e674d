"""
The record of a run: everything that determines its result. It is saved with every checkpoint and compared on resuming.

It holds the settings that change the result, the configuration of the model, and fingerprints of the training data
and of the frozen weights. Paths are not compared, so that data and encoders may be moved.
"""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from mfuser.data.validation import evenly_spaced
from mfuser.loading import config_content

try:
    import datasets
except ImportError:
    datasets = None

RECORD_FILE = "mfuser_run.json"
FORMAT = 1
SAMPLED_ROWS = 64
SAMPLED_VALUES = 1024
# Settings that may change when a run is resumed: they do not change the result. Prefixes end with an underscore.
FREE_SETTINGS = (
    *("output_dir", "overwrite_output_dir", "resume", "run_name", "report_to", "disable_tqdm", "project", "debug"),
    *("logging_", "log_", "trackio_", "hub_", "push_to_hub", "save_", "eval_", "monitor_", "do_", "include_"),
    *("dataloader_", "ddp_", "fsdp", "fsdp_", "deepspeed", "accelerator_config", "parallelism_config", "tpu_"),
    *("per_device_eval_batch_size", "use_cpu", "local_rank", "torch_compile", "torch_compile_", "torch_empty_cache_"),
    *("activation_checkpointing", "activation_checkpointing_", "gradient_checkpointing", "gradient_checkpointing_"),
    *("skip_memory_metrics", "enable_jit_checkpoint", "batch_eval_metrics", "prediction_loss_only", "label_names"),
    *("restore_callback_states_from_checkpoint", "max_nonfinite_steps", "skip_unreadable"),
    # Exceptions, which change the result: the schedule is computed for the new length.
    *("max_steps", "num_train_epochs"),
)
COMPARED_AFTER_ALL = ("dataloader_drop_last",)  # decides which samples an epoch has


def is_free(name: str) -> bool:
    """Whether a setting may change when a run is resumed."""
    if name in COMPARED_AFTER_ALL:
        return False
    return name in FREE_SETTINGS or any(name.startswith(each) for each in FREE_SETTINGS if each.endswith("_"))


def training_settings(arguments: TrainingArguments) -> dict[str, Any]:
    """The training arguments that determine the result, as JSON values, and the number of processes."""
    names = [item.name for item in dataclasses.fields(arguments) if item.init and not is_free(item.name)]
    settings = {name: as_json(getattr(arguments, name)) for name in names}
    return settings | {"number of processes": arguments.world_size}


def as_json(value: Any) -> Any:
    """A value after a round trip through JSON."""
    if isinstance(value, enum.Enum):
        value = value.value
    return json.loads(json.dumps(value, default=str))


def describe_data(source: str, split: str | None, dataset) -> dict[str, Any]:
    """
    Identifies a dataset by its number of rows and by the content of evenly spaced ones.

    Args:
        source, split (`str`):
            Where the dataset comes from. They are recorded and not compared.
        dataset (`datasets.Dataset`):
            Rows with the columns `image` and `label`.
    """
    rows = dataset.select_columns(["image", "label"])
    for column in ("image", "label"):
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    digest = hashlib.sha256()
    for position in evenly_spaced(SAMPLED_ROWS, len(rows)):
        row = rows[position]
        for column in ("image", "label"):
            digest.update(_bytes_of(row[column]))
    return {"source": str(source), "split": split, "rows": len(rows), "content": digest.hexdigest()[:16]}


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return value["bytes"]
        file = Path(value["path"] or "")
        return file.read_bytes() if file.is_file() else b""
    return json.dumps(value, default=str).encode()


def frozen_weights(model: nn.Module) -> str | None:
    """A fingerprint of the weights that are not trained, of which a checkpoint may hold none; `None` without any."""
    digest, found = hashlib.sha256(), False
    for name, weight in sorted(model.named_parameters()):
        if not weight.requires_grad:
            values = weight.detach().flatten()
            sample = values[:: max(1, len(values) // SAMPLED_VALUES)][:SAMPLED_VALUES].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
            found = True
    return digest.hexdigest()[:16] if found else None


def run_record(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    encoders: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The record of a run.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, before training.
        arguments ([`~mfuser.training.trainer.MFuserTrainingArguments`]):
            The training arguments.
        settings (`dict`):
            Further settings that determine the result, such as the augmentation.
        data (`dict`):
            The training and validation data, see [`describe_data`].
        encoders (`dict`, *optional*):
            Where the pretrained encoders come from. They are recorded and not compared.
    """
    length = {"max_steps": arguments.max_steps, "num_train_epochs": arguments.num_train_epochs}
    return {
        "format": FORMAT,
        "settings": training_settings(arguments) | as_json(dict(settings)),
        "data": as_json(dict(data)),
        # A training ignores the calibration of the model that it starts from.
        "model": as_json(config_content(model.config) | {"confidence_temperature": None}),
        "frozen_weights": frozen_weights(model),
        "encoders": dict(encoders) if encoders else None,
        "lengths": [{"from_step": 0, **length}],
    }


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record in a checkpoint; `None` if it was saved without one."""
    file = Path(folder, RECORD_FILE)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two records, in words with both values; empty if a run of one can continue the other."""
    found = []
    for part in ("settings", "data", "model", "frozen_weights"):
        prefix = {"model": "model_config", "frozen_weights": "frozen_weights"}.get(part, "")
        before, now = (_flat(record.get(part), prefix) for record in (saved, current))
        for name in sorted({*before, *now}):
            old, new = before.get(name, "not set"), now.get(name, "not set")
            # Other versions of Transformers have other settings: those that only one of them has are not compared.
            if _compared(old) != _compared(new) and not (part != "data" and "not set" in (old, new)):
                found.append(f"{name} was {_shown(old)} and is {_shown(new)}")
    return found


def _flat(values: Any, name: str) -> dict[str, Any]:
    """Nested dictionaries as one, with dots in the names. Descriptions of data are values."""
    if not isinstance(values, Mapping) or not values or _is_data(values):
        return {name: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{name}.{key}".removeprefix("."))
    return flat


def _is_data(value: Any) -> bool:
    return isinstance(value, Mapping) and {"rows", "content"} <= value.keys()


def _compared(value: Any) -> Any:
    """The part of a value that is compared: of data, the content but not the location."""
    return (value["rows"], value["content"]) if _is_data(value) else value


def _shown(value: Any) -> str:
    if _is_data(value):
        return f"{value['source']} ({value['split']}, {value['rows']} rows, {value['content']})"
    return str(value)


def with_length(record: dict[str, Any], saved: Mapping[str, Any] | None, step: int) -> dict[str, Any]:
    """The record of a run that continues another from a step, with the lengths of both if they differ."""
    earlier, (now,) = list(saved["lengths"]) if saved else [], record["lengths"]
    same = bool(earlier) and {**earlier[-1], "from_step": 0} == now
    return record | {"lengths": earlier if same else [*earlier, now | {"from_step": step}]}


def check_record(checkpoint: str | Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """
    Checks that a run can be continued from a checkpoint.

    Args:
        checkpoint (`str` or `Path`):
            The checkpoint.
        record (`dict`):
            The record of the run that is to continue it.

    Returns:
        `dict`, *optional*: The record in the checkpoint.

    Raises:
        ValueError: If the checkpoint belongs to a run of other settings, data or model. All differences are named.
    """
    saved = read_record(checkpoint)
    if saved is None:
        return None
    if saved.get("format") != FORMAT:
        raise ValueError(f"{Path(checkpoint, RECORD_FILE)} has the format {saved.get('format')}; it must be {FORMAT}")
    if found := differences(saved, record):
        raise ValueError(
            f"{checkpoint} was saved by another run: {'; '.join(found)}. Resume with the same settings, of which "
            "max_steps and num_train_epochs may change, or start a new run in another output_dir"
        )
    return saved


__all__ = ["RECORD_FILE", "check_record", "describe_data", "read_record", "run_record", "with_length"]
