"""The settings of `mfuser train`, and the checks of their names, types and ranges."""

import dataclasses
import inspect
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, PreTrainedConfig
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.configuration_mfuser import MFuserConfig
from mfuser.data.augmentation import TrainingAugmentation
from mfuser.data.sources import RARE_CLASS_SCOPES
from mfuser.encoder_configs_mfuser import COMMON_ARGUMENTS, DEFAULT_ENCODERS, encoder_class
from mfuser.scripts.settings import BOOLEANS, check_names, read_settings, typed
from mfuser.training.trainer import MFuserTrainingArguments


@dataclass
class ModelArguments:
    """The model to train: `model`, or `vfm` and `vlm`, or only `model_config`."""

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an MFuser model to train further, on the same classes or others."},
    )
    vfm: str | None = field(default=None, metadata={"help": "Folder or Hub id of the vision foundation model."})
    vlm: str | None = field(default=None, metadata={"help": "Folder or Hub id of the vision-language model."})
    vfm_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `vfm` on the Hub (default: the main branch)."}
    )
    vlm_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `vlm` on the Hub (default: the main branch)."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the vision-language model's tokenizer (default: that of `vlm`). A `model` "
            "whose folder contains none needs it for data with other classes."
        },
    )
    model_config: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Fields of MFuserConfig. Without `model`, `vfm` and `vlm`, they describe a randomly initialised "
            "model, whose class names are those of the training data."
        },
    )

    def __post_init__(self):
        if (self.model and (self.vfm or self.vlm)) or bool(self.vfm) != bool(self.vlm):
            given = ", ".join(f"{name}={getattr(self, name)}" for name in ("model", "vfm", "vlm"))
            raise ValueError(
                f"the model is given as {given}; give either `model`, or `vfm` and `vlm`, or `model_config`"
            )
        for name in ("vfm", "vlm"):
            revision, source = getattr(self, f"{name}_revision"), getattr(self, name)
            if revision is not None and (source is None or Path(source).is_dir()):
                raise ValueError(f"{name}_revision is {revision} and {name} is {source}; a revision needs a Hub id")


@dataclass
class DataArguments:
    """The training and validation data."""

    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folder written by `mfuser prepare`, parquet files, or folder or Hub id of a dataset; or a list "
            "of several, as in [data/gta5, data/synthia]."
        },
    )
    train_split: list[str] | None = field(
        default_factory=lambda: ["train"],
        metadata={"help": "Split of train_data to train on; or a list of one for each of several (default: train)."},
    )
    train_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights by which several train_data are drawn (default: their numbers of images)."},
    )
    mask_unlabelled_classes: bool = field(
        default=True,
        metadata={
            "help": "With several train_data, whether classes that one of them does not label are left out of the "
            "loss of its images. Otherwise they are treated as absent, as in plain concatenation."
        },
    )
    validation_data: str | None = field(
        default=None,
        metadata={
            "help": "Data by which the best checkpoint is selected, given as for train_data. Use the source domain, "
            "never a target domain."
        },
    )
    validation_split: str | None = field(
        default="validation", metadata={"help": "Split of validation_data to validate on."}
    )
    validation_size: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Size that validation images are resized to, in the form of MFuserImageProcessor's `size` "
            "(default: that of the image processor of `model`, or none)."
        },
    )
    monitor_data: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Target domains whose mean IoU is logged during training and cannot select the checkpoint: "
            "FOLDER or FOLDER:SPLIT for each name (default split: validation). "
            "For example monitor_data.night=data/acdc:train."
        },
    )
    monitor_images: int | None = field(
        default=50, metadata={"help": "Number of images of each monitored domain, evenly spaced; null: all."}
    )
    skip_unreadable: bool = field(
        default=False,
        metadata={
            "help": "Whether training and validation rows that cannot be read are skipped, with a warning and a "
            "count, instead of ending the run. Monitored domains always skip them."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(
        default="label",
        metadata={"help": "Column of the label maps, with class ids and 255 for ignored pixels."},
    )
    id2label: str | None = field(
        default=None,
        metadata={"help": "JSON file of class names by id, or name of a domain, for data without class names."},
    )
    augmentation: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Arguments of TrainingAugmentation (default: the published ones, with the model's crop_size and "
            "the mean and deviation of the image processor of `model`). image_mean and image_std hold for the saved "
            "image processor as well."
        },
    )
    rare_class_sampling: bool = field(
        default=True, metadata={"help": "Whether images of rare classes are drawn more often."}
    )
    rare_class_scope: str = field(
        default="source",
        metadata={
            "help": "With several train_data: source draws one of them by its weight, then a class; joint draws a "
            "class over all of them."
        },
    )
    rare_class_temperature: float = field(
        default=100.0,
        metadata={"help": "Temperature of the class probabilities: the higher, the closer to uniform."},
    )
    rare_class_min_pixels: int = field(
        default=3000,
        metadata={"help": "An image is drawn for a class if it holds more than this number of its pixels."},
    )

    def __post_init__(self):
        if isinstance(self.train_data, str):
            self.train_data = [self.train_data]
        splits: Any = self.train_split if isinstance(self.train_split, list) else [self.train_split]
        sources = self.train_data or []
        self.train_split = splits * len(sources) if len(splits) == 1 else splits
        if len(sources) != len(self.train_split or ()):
            raise ValueError(
                f"train_split is {self.train_split} and train_data {self.train_data}; give one split for all of them, "
                "or one for each"
            )
        if self.train_weights and len(sources) < 2:
            raise ValueError(f"train_weights is {self.train_weights}; weights require a list of several train_data")
        if self.rare_class_scope not in RARE_CLASS_SCOPES:
            raise ValueError(
                f"rare_class_scope is {self.rare_class_scope!r}; it must be one of {', '.join(RARE_CLASS_SCOPES)}"
            )
        if self.rare_class_min_pixels < 0:
            raise ValueError(f"rare_class_min_pixels is {self.rare_class_min_pixels}; it must not be negative")
        if self.rare_class_temperature <= 0:
            raise ValueError(f"rare_class_temperature is {self.rare_class_temperature}; it must be positive")
        if self.monitor_images is not None and self.monitor_images < 1:
            raise ValueError(f"monitor_images is {self.monitor_images}; it must be at least 1, or null for all images")


@dataclass
class TrainArguments(MFuserTrainingArguments):
    resume: str | bool = field(
        default=False,
        metadata={"help": "true: continue from the last checkpoint in output_dir, if there is one. Or a checkpoint."},
    )

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the checkpoints and the model that output_dir holds when the training starts."},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.resume, str):
            self.resume = BOOLEANS.get(self.resume.lower(), self.resume)


# Arguments of `from_vfm_vlm_pretrained` that are not fields of MFuserConfig.
PAIRING_ARGUMENTS = {"patch_size": int | None, "class_token_length": int}
IMAGE_SIZES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
# Settings of Transformers' Trainer that would be ignored, and what to use instead.
WITHOUT_EFFECT = {
    "resume_from_checkpoint": "resume",
    "data_seed": "seed",
    "train_sampling_strategy": "rare_class_sampling",
    "do_train": "max_steps",
    "do_eval": "eval_strategy",
    "do_predict": "`mfuser evaluate`",
    "label_names": "label_column",
    "bf16_full_eval": "bf16",
    "fp16_full_eval": "fp16",
}
# Settings of Transformers' evaluation, which MFuserTrainer does not use.
OF_TRANSFORMERS_EVALUATION = (
    *("prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("batch_eval_metrics", "include_for_metrics"),
)
logger = logging.get_logger("transformers.mfuser.train")


def argument_parser() -> HfArgumentParser:
    """The parser of the settings, whose help lists them."""
    description = "Trains a model with the settings of a recipe (a YAML file) and of the command line."
    kinds = (ModelArguments, DataArguments, TrainArguments)
    return HfArgumentParser(kinds, prog="mfuser train", description=description)


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """
    Reads the settings (see [`~mfuser.scripts.settings.read_settings`]) and checks their names, types and ranges.

    Raises:
        ValueError: If a setting is unknown or has no effect, or its value is of another type or out of range. A
            setting of a recipe that has no effect because of another one is a warning.
    """
    settings = read_settings(arguments)
    kinds = (ModelArguments, DataArguments, TrainArguments)
    declared = {name: kind for each in kinds for name, kind in typing.get_type_hints(each).items()}
    declared = {item.name: declared[item.name] for each in kinds for item in dataclasses.fields(each)}
    more = [f"model_config.{name}" for name in MFuserConfig.__dataclass_fields__]
    more += [f"augmentation.{name}" for name in augmentation_arguments()]
    check_names(settings, declared, more=more)
    for name, instead in WITHOUT_EFFECT.items():
        if name in settings:
            raise ValueError(f"{name} has no effect in mfuser train; use {instead}")
    for name in OF_TRANSFORMERS_EVALUATION:
        if name in settings:
            raise ValueError(f"{name} has no effect in mfuser train, whose evaluation keeps only counts of pixels")
    settings = {name: typed(value, declared[name], name) for name, value in settings.items()}
    for name, check in (("model_config", model_fields), ("augmentation", augmentation_fields)):
        settings[name] = check(settings.get(name) or {})
    check_names(settings.get("validation_size") or {}, IMAGE_SIZES, "validation_size")
    try:
        model, data, training = argument_parser().parse_dict(settings)
    except TypeError as error:  # of the classes that Transformers builds from settings that are dictionaries
        raise ValueError(f"a setting of Transformers' Trainer has a field that does not exist: {error}") from error
    on_command_line = {argument.removeprefix("--").partition("=")[0] for argument in arguments}
    for name, reason in without_effect(data, training).items():
        if name in on_command_line:
            raise ValueError(f"{name} has no effect: {reason}")
        if name in settings:  # of a recipe, which may be the base of others
            logger.warning(f"{name} has no effect: {reason}.")
    return model, data, training


def without_effect(data: DataArguments, training: TrainArguments) -> dict[str, str]:
    """The settings that have no effect with these values of the others, and the reason of each."""
    reasons: dict[str, str] = {}
    schedule = SchedulerType(training.lr_scheduler_type)
    if schedule != SchedulerType.POLYNOMIAL:
        names = ("min_learning_rate", "schedule_power", "warmup_start")
        reasons |= dict.fromkeys(names, f"lr_scheduler_type is {schedule.value}, and only polynomial uses it")
    if schedule == SchedulerType.CONSTANT:
        reasons["warmup_steps"] = "lr_scheduler_type is constant; constant_with_warmup uses it"
    if training.per_device_eval_batch_size != 1:
        reasons["per_device_eval_batch_size"] = "images are evaluated one by one"
    if not data.rare_class_sampling:
        names = ("rare_class_temperature", "rare_class_min_pixels", "rare_class_scope")
        reasons |= dict.fromkeys(names, "rare_class_sampling is false")
    if data.train_data is not None and len(data.train_data) == 1:
        values = {"rare_class_scope": data.rare_class_scope, "mask_unlabelled_classes": data.mask_unlabelled_classes}
        changed = [name for name, value in values.items() if value in ("joint", False)]
        reasons |= dict.fromkeys(changed, "it is for several train_data, of which there is one")
    if not data.monitor_data:
        reasons["monitor_images"] = "there is no monitor_data"
    return reasons


def augmentation_arguments() -> dict[str, Any]:
    """The types of the arguments of [`TrainingAugmentation`]."""
    return {name: item.annotation for name, item in inspect.signature(TrainingAugmentation).parameters.items()}


def augmentation_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The setting `augmentation` with checked names and types."""
    declared = augmentation_arguments()
    check_names(values, declared, "augmentation")
    return {name: typed(value, declared[name], f"augmentation.{name}") for name, value in values.items()}


def model_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The setting `model_config` with checked names and types, those of the encoders' configurations included."""
    declared = config_types(MFuserConfig) | PAIRING_ARGUMENTS
    check_names(values, [*declared, *COMMON_ARGUMENTS], "model_config")
    if values.get("semantic_loss_ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        raise ValueError(
            f"model_config.semantic_loss_ignore_index is {values['semantic_loss_ignore_index']!r}; it must be "
            f"{IGNORE_INDEX}, the label of ignored pixels in the data"
        )
    checked = dict(values)
    for name, value in values.items():
        if name in DEFAULT_ENCODERS and isinstance(value, dict):
            checked[name] = encoder_fields(f"model_config.{name}", value, str(DEFAULT_ENCODERS[name]["model_type"]))
        elif name in DEFAULT_ENCODERS:
            raise ValueError(f"model_config.{name} is {value!r}; it must be a dictionary of fields")
        elif name in declared:
            checked[name] = typed(value, declared[name], f"model_config.{name}")
    return checked


def encoder_fields(role: str, values: dict[str, Any], default_type: str) -> dict[str, Any]:
    """The fields of an encoder's configuration with checked names and types."""
    declared = config_types(encoder_class(values.get("model_type", default_type)))
    check_names(values, ["model_type", *declared, *COMMON_ARGUMENTS], role)
    return {name: typed(value, declared.get(name, Any), f"{role}.{name}") for name, value in values.items()}


def config_types(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The types of a configuration's fields; those that Transformers declares as text are not checked."""
    fields = {item.name: item.type for item in dataclasses.fields(config_class)}
    return {name: Any if isinstance(kind, str) else kind for name, kind in fields.items()}


__all__ = ["DataArguments", "ModelArguments", "TrainArguments", "argument_parser", "parse_arguments"]
