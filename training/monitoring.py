"""
Target domains that are scored during training.

Their scores are only logged: they are not among the metrics by which [`Trainer`] selects the best checkpoint, and
training is bit-identical with and without them.
"""

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from mfuser.data.loading import PREPARATION_FILE
from mfuser.data.rows import DatasetRows
from mfuser.data.tables import DOMAINS
from mfuser.data.validation import dataset_files, evenly_spaced, validation_sample
from mfuser.evaluation.domains import EvaluationDomain, check_classes, open_domain

PREFIX = "monitor"
REASON = "selecting on a target domain invalidates a domain-generalisation result"


class MonitoredDomain(Dataset):
    """
    Evenly spaced images of a domain, prepared by an image processor, with their label maps at full size.

    Args:
        domain ([`~mfuser.evaluation.domains.EvaluationDomain`]):
            The domain.
        image_processor ([`MFuserImageProcessor`]):
            Resizes and normalises the images. The label maps are not resized.
        images (`int`, *optional*):
            The number of images. By default all.

    Raises:
        ValueError: If the domain has no labels, or `images` is less than 1.
    """

    def __init__(self, domain: EvaluationDomain, image_processor, images: int | None = None):
        if not domain.rows.labelled:
            raise ValueError(f"{domain.source}, split {domain.split}, has no labels and cannot be monitored")
        self.domain, self.image_processor = domain, image_processor
        self.positions = evenly_spaced(images, len(domain.rows))

    @property
    def dataset(self):
        """The `datasets.Dataset` that holds the rows; `None` for the files of a download."""
        return self.domain.rows.dataset if isinstance(self.domain.rows, DatasetRows) else None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, or `{"error": message}` for a row that cannot be read, which must not end the training."""
        position = self.positions[index]
        try:
            image, label = self.domain.read(position)
            if label is None:
                raise ValueError("the label is missing")
            return validation_sample(image, label, self.image_processor)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises errors of almost any type for damaged files
            return {"error": f"{self.title(index)}: {error}"}

    def title(self, index: int) -> str:
        """What messages call a sample."""
        position = self.positions[index]
        return f"{self.domain.source}, row {position} ({self.domain.rows.names[position]})"


def open_monitored_domains(
    monitor_data: dict[str, str],
    class_names: dict[int, str],
    image_processor,
    images: int | None = None,
    image_column: str = "image",
    label_column: str = "label",
    id2label: str | None = None,
) -> dict[str, MonitoredDomain]:
    """
    Opens the domains to monitor.

    Args:
        monitor_data (`dict[str, str]`):
            For each name, the source of [`~mfuser.evaluation.domains.open_domain`], with `:split` appended if the
            split is not "validation". The name of a known domain selects its label map.
        class_names (`dict[int, str]`):
            The classes of the model, which must be those of every domain.
        image_processor, images:
            As in [`MonitoredDomain`].
        image_column, label_column, id2label:
            As in [`~mfuser.evaluation.domains.open_domain`]. `id2label` is used for names of unknown domains.

    Returns:
        `dict[str, MonitoredDomain]`: The domains by name.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If a domain has other classes than the model or no labels, or cannot be opened.
    """
    monitored = {}
    for name, source in monitor_data.items():
        folder, split = _source_and_split(source)
        names = None if name in DOMAINS else id2label
        domain = open_domain(name, folder, split, None, image_column, label_column, names, skip_unreadable=True)
        check_classes(class_names, domain)
        monitored[name] = MonitoredDomain(domain, image_processor, images)
    return monitored


def _source_and_split(source: str) -> tuple[str, str | None]:
    """Splits `FOLDER:split`; a path that exists is a folder without a split."""
    folder, colon, split = source.rpartition(":")
    return (folder, split) if colon and not Path(source).exists() else (source, None)


# --- selection -------------------------------------------------------------------------------------------------------


def check_selection(
    metric: str | None,
    metrics: list[str],
    eval_dataset: Dataset | Mapping[str, Dataset] | None,
    monitored: Mapping[str, Dataset],
) -> None:
    """
    Checks that the best checkpoint is selected by validation data and not by a monitored domain.

    Args:
        metric (`str`, *optional*):
            `metric_for_best_model`, with or without "eval_".
        metrics (`list[str]`):
            The metrics of one evaluation, without prefix.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            The validation data.
        monitored (`dict[str, Dataset]`):
            The monitored domains.

    Raises:
        ValueError: If `metric` names a monitored domain, none of several validation sets or no metric, or if a
            monitored domain is also given as validation data.
    """
    named: Mapping[str, Dataset | None] = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    for name, dataset in monitored.items():
        if name in named or any(_same_rows(dataset, other) for other in named.values()):
            raise ValueError(
                f"the monitored domain {name!r} is also given as validation data: {REASON}; validate on the source "
                "domain"
            )
    if metric is None:
        return
    bare = metric.removeprefix("eval_")
    available = [f"{name}_{each}" if name else each for name in named for each in metrics]
    if bare in available:
        return
    if bare.startswith(f"{PREFIX}_") or any(bare == name or bare.startswith(f"{name}_") for name in monitored):
        raise ValueError(
            f"metric_for_best_model is {metric}, a score of a monitored domain: {REASON}; use a score of the "
            "validation data, such as mean_iou"
        )
    if isinstance(eval_dataset, Mapping) and not any(bare.startswith(f"{name}_") for name in eval_dataset):
        raise ValueError(
            f"metric_for_best_model is {metric}; with several validation sets it must name one of them, such as "
            f"{available[0]}"
        )
    raise ValueError(f"metric_for_best_model is {metric}; it must be one of {', '.join(available)}")


def _same_rows(first: Dataset, second: Dataset | None) -> bool:
    files = [dataset_files(getattr(dataset, "dataset", None)) for dataset in (first, second)]
    return first is second or bool(files[0] & files[1])


def check_validation_source(
    validation_data: str, train_data: str | list[str], monitored: dict[str, MonitoredDomain]
) -> None:
    """
    Checks that the validation data is not another split of a monitored domain.

    Validation data of a training domain is accepted: its splits may be domains of their own, like CamVid's dusk.

    Raises:
        ValueError: If the folder or the prepared domain of `validation_data` is that of a monitored domain and not
            that of training data.
    """
    trained = set().union(*map(_domains_of, [train_data] if isinstance(train_data, str) else train_data))
    validated = _domains_of(validation_data) - trained
    for name, dataset in monitored.items():
        known = {dataset.domain.domain.name} if dataset.domain.domain else set()
        if validated & (_domains_of(dataset.domain.source) | known):
            raise ValueError(
                f"validation_data {validation_data} belongs to the monitored domain {name!r}: {REASON}; validate on "
                f"the source domain, or remove {name!r} from monitor_data"
            )


def _domains_of(source: str) -> set[str]:
    """What identifies the domain of a source: its folder or Hub id, and the domain as which it was prepared."""
    path = Path(source)
    if not path.exists():
        return {source}
    folder = (path.parent if path.is_file() else path).resolve()
    found = {str(folder)}
    for place in (folder, folder.parent):
        if (place / PREPARATION_FILE).is_file():
            found.add(json.loads((place / PREPARATION_FILE).read_text(encoding="utf-8"))["domain"])
    return found


# --- during training -------------------------------------------------------------------------------------------------


class MonitorCallback(TrainerCallback):
    """Scores the monitored domains every `monitor_steps` steps and after the last step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.monitor_steps == 0 or state.global_step == state.max_steps:
            should_log = control.should_log  # logging resets it, and the loss of this step would not be logged
            self.trainer.monitor()
            control.should_log = should_log


@contextlib.contextmanager
def training_state_preserved(model: nn.Module) -> Iterator[None]:
    """Restores the random states of Python, NumPy and PyTorch and the mode of every module of `model`."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that other code may use
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, mode in modes:
            module.training = mode


__all__ = [
    "MonitorCallback",
    "MonitoredDomain",
    "check_selection",
    "check_validation_source",
    "open_monitored_domains",
    "training_state_preserved",
]
