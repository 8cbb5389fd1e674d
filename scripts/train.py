"""
Trains a model with the settings of a recipe.

    mfuser train recipes/gta5_clip.yaml --train_data data/gta5 --validation_data data/gta5 --output_dir runs/gta5-clip

A recipe is a YAML file of settings. The settings of a recipe that it names as `base` apply as well, unless the recipe
overrides them. The command line overrides both, with `--name value` or `name=value`, and with
`model_config.crop_size=256` for a single field of `model_config`. `mfuser train --help` lists the settings, including
those of Transformers' Trainer. With `--resume true`, the same command continues an interrupted run from its last
complete checkpoint. `accelerate launch -m mfuser.scripts.train recipes/gta5_clip.yaml ...` trains on several devices.
"""

import dataclasses
import functools
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset, Sampler
from transformers import HfArgumentParser, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from mfuser.class_names_mfuser import give_classes, label_names
from mfuser.configuration_mfuser import MFuserConfig
from mfuser.data.augmentation import AugmentedDataset, Draw, ShuffledSampler, TrainingAugmentation
from mfuser.data.loading import load_domain
from mfuser.data.rare_class_sampling import RareClassSampler, count_class_pixels
from mfuser.data.sources import MultiSourceDataset, TrainingSource, joint_classes, multi_source_sampler
from mfuser.data.validation import ValidationDataset
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.loading import load_model, restore_weights, saved_encoders
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts.model_card import write_model_card
from mfuser.training.monitoring import check_validation_source, open_monitored_domains
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

logger = logging.get_logger("transformers.mfuser.train")


@dataclass
class ModelArguments:
    """The model to train: `model`, or `vfm` and `vlm`, or only `model_config`."""

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an MFuser model to train further, on the same classes or others."},
    )
    vfm: str | None = field(default=None, metadata={"help": "Folder or Hub id of the vision foundation model."})
    vlm: str | None = field(default=None, metadata={"help": "Folder or Hub id of the vision-language model."})
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
            "loss of its images. Otherwise they are taught as absent, as in plain concatenation."
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
        metadata={"help": "Size that validation images are resized to, in the form of MFuserImageProcessor's `size`."},
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
            "help": "Arguments of TrainingAugmentation (default: the published ones, with the model's crop_size)."
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


@dataclass
class TrainArguments(MFuserTrainingArguments):
    resume: str | None = field(
        default=None,
        metadata={"help": "true: continue from the last checkpoint in output_dir, if there is one. Or a checkpoint."},
    )


class SettingsLoader(yaml.SafeLoader):
    """Reads YAML with the numbers and booleans of YAML 1.2: `1e-4` is a number and `no` is a string."""


FLOAT, BOOLEAN = "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"
SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (FLOAT, BOOLEAN)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(BOOLEAN, re.compile(r"(?:true|false)\Z", re.IGNORECASE), "tTfF")
SettingsLoader.add_implicit_resolver(
    FLOAT, re.compile(r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)\Z"), "-+.0123456789"
)


def read_recipe(recipe: Path) -> dict[str, Any]:
    """The settings of a recipe and, where it does not override them, of its `base`, a recipe in the same folder."""
    if not recipe.is_file():
        raise ValueError(
            f"there is no recipe {recipe}; the published recipes are in {Path(__file__).parents[1] / 'recipes'}"
        )
    settings = yaml.load(recipe.read_text(encoding="utf-8"), SettingsLoader)
    if not isinstance(settings, dict):
        raise ValueError(f"{recipe} holds {settings!r}; a recipe must hold settings such as `learning_rate: 1e-4`")
    base = settings.pop("base", None)
    return (read_recipe(recipe.with_name(base)) if base else {}) | settings


def read_settings(arguments: list[str]) -> dict[str, Any]:
    """
    Reads the settings of the command line and of the recipe that it may begin with.

    Args:
        arguments (`list[str]`):
            The arguments of the command. Settings that are given here override those of the recipe.

    Returns:
        `dict`: The value of each setting by its name.

    Raises:
        ValueError: If an argument is not a setting, or the recipe does not exist or holds no settings.
    """
    settings, arguments = {}, list(arguments)
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        settings = read_recipe(Path(arguments.pop(0)))
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if not equals:
            if not name.startswith("--"):
                raise ValueError(f"{name!r} is not a setting; write settings as --name value or name=value")
            if not arguments:
                raise ValueError(f"{name} has no value; write settings as --name value or name=value")
            value = arguments.pop(0)
        *path, name = name.removeprefix("--").split(".")
        target = settings
        for part in path:
            target = target.setdefault(part, {})
        target[name] = yaml.load(value, SettingsLoader)
    return settings


def argument_parser() -> HfArgumentParser:
    return HfArgumentParser(
        (ModelArguments, DataArguments, TrainArguments), prog="mfuser train", description=__doc__, add_help=True
    )


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """
    Reads the settings (see [`read_settings`]) and checks their names.

    Raises:
        ValueError: If a setting is unknown.
    """
    parser = argument_parser()
    settings = read_settings(arguments)
    known = {item.name for kind in parser.dataclass_types for item in dataclasses.fields(kind)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"unknown settings: {', '.join(unknown)}; `mfuser train --help` lists the settings")
    return parser.parse_dict(settings)


def build_model(options: ModelArguments, id2label: dict[int, str]) -> MFuserForSemanticSegmentation:
    """
    Loads or initialises the model that the options describe.

    Args:
        options ([`ModelArguments`]):
            What to load, or the configuration of a randomly initialised model.
        id2label (`dict[int, str]`):
            The classes of the data.

    Returns:
        [`MFuserForSemanticSegmentation`]: The model, in float32.

    Raises:
        ValueError: If the options describe no model or several, or the classes of the data cannot be given to a saved
            model.
    """
    if (options.model and (options.vfm or options.vlm)) or bool(options.vfm) != bool(options.vlm):
        given = ", ".join(f"{name}={getattr(options, name)}" for name in ("model", "vfm", "vlm"))
        raise ValueError(f"the model is given as {given}; give either `model`, or `vfm` and `vlm`, or `model_config`")
    class_names = list(id2label.values())
    if options.model:
        model = load_model(options.model, dtype=torch.float32, **options.model_config)
        if class_names != label_names(model.config.id2label):
            tokenizer = options.tokenizer or (encoders_of(options) or {}).get("vlm")
            logger.warning(
                f"{options.model} is trained on other classes; {give_classes(model, class_names, tokenizer)}"
            )
        return model
    if options.vfm and options.vlm:
        return MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
            options.vfm, options.vlm, class_names=class_names, tokenizer=options.tokenizer, **options.model_config
        )
    if not options.model_config:
        raise ValueError("no model is given; give `model`, or `vfm` and `vlm`, or `model_config`")
    label2id = {name: index for index, name in id2label.items()}
    return MFuserForSemanticSegmentation(MFuserConfig(id2label=id2label, label2id=label2id, **options.model_config))


def encoders_of(options: ModelArguments) -> dict[str, str] | None:
    """Folder or Hub id of the model's pretrained `vfm` and `vlm`, where known."""
    if options.vfm and options.vlm:
        return {"vfm": options.vfm, "vlm": options.vlm}
    return saved_encoders(options.model) if options.model else None


def build_sampler(sources: list[TrainingSource], data: DataArguments, seed: int) -> Sampler[Draw]:
    """The sampler of the sources. Counts the pixels of each class first if rare classes are drawn more often."""
    rare_classes: dict[str, Any] = {
        "temperature": data.rare_class_temperature,
        "min_pixels": data.rare_class_min_pixels,
    }
    if len(sources) > 1:
        scope = data.rare_class_scope if data.rare_class_sampling else None
        return multi_source_sampler(sources, data.train_weights, seed, scope, **rare_classes)
    if not data.rare_class_sampling:
        return ShuffledSampler(len(sources[0].dataset), seed=seed)
    counts = count_class_pixels(sources[0].dataset, len(sources[0].id2label))
    return RareClassSampler(counts, seed=seed, **rare_classes)


def build_trainer(model_options: ModelArguments, data: DataArguments, training: TrainArguments) -> MFuserTrainer:
    """
    Opens the data, builds the model and returns the trainer of both.

    Raises:
        ValueError: If `train_data` is missing, or classes of data and model differ.
    """
    if not data.train_data:
        raise ValueError("train_data is missing; give a folder written by `mfuser prepare` as --train_data FOLDER")
    open_data = functools.partial(
        load_domain, image_column=data.image_column, label_column=data.label_column, id2label=data.id2label
    )
    processor = MFuserImageProcessor(**({"size": data.validation_size} if data.validation_size else {}))
    with training.main_process_first(desc="opening the data"):
        sources = [
            TrainingSource.from_domain(source, open_data(source, split))
            for source, split in zip(data.train_data, data.train_split or (), strict=True)
        ]
        id2label = joint_classes(sources)
        validation = open_data(data.validation_data, data.validation_split) if data.validation_data else None
        if validation and validation.id2label != id2label:
            raise ValueError(
                f"{' and '.join(data.train_data)} together have the classes {', '.join(id2label.values())}; "
                f"{data.validation_data} has {', '.join(validation.id2label.values())}"
            )
        monitored = open_monitored_domains(
            data.monitor_data,
            id2label,
            processor,
            images=data.monitor_images,
            image_column=data.image_column,
            label_column=data.label_column,
            id2label=data.id2label,
        )
        if data.validation_data:
            check_validation_source(data.validation_data, data.train_data, monitored)
        sampler = build_sampler(sources, data, training.seed)
    set_seed(training.seed)
    model = build_model(model_options, id2label)
    augmentation = TrainingAugmentation(**{"crop_size": model.config.crop_size, **data.augmentation})
    train_dataset: Dataset
    if len(sources) == 1:
        train_dataset = AugmentedDataset(sources[0].dataset, augmentation, seed=training.seed)
    else:
        train_dataset = MultiSourceDataset(sources, augmentation, training.seed, data.mask_unlabelled_classes)
    return MFuserTrainer(
        model,
        training,
        train_dataset=train_dataset,
        train_sampler=sampler,
        eval_dataset=ValidationDataset(validation.dataset, processor) if validation else None,
        encoders=encoders_of(model_options),
        monitored=monitored,
        processing_class=processor,
    )


def checkpoint_to_resume(training: TrainArguments) -> str | None:
    """The checkpoint to continue from: the one that `resume` names, or the last one in `output_dir` if any."""
    resume: Any = training.resume  # a path, or YAML's true or false
    if resume in (None, False):
        return None
    if resume is not True:
        return resume
    return get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None


def about(trainer: MFuserTrainer, data: DataArguments, metrics: dict[str, float]) -> str:
    """The paragraph of the model card on how the model was trained."""
    steps, batch = trainer.state.global_step, trainer.args.train_batch_size * trainer.args.world_size
    batch *= trainer.args.gradient_accumulation_steps
    sources = [
        f"{Path(source).name}, split {split}"
        for source, split in zip(data.train_data or (), data.train_split or (), strict=True)
    ]
    text = f"Trained by `mfuser train` on {' and '.join(sources)}: {steps} steps of "
    text += f"{batch} crops of {trainer.train_dataset.augmentation.crop_size} pixels, learning rate "
    text += f"{trainer.args.learning_rate:g}."
    if "eval_mean_iou" in metrics:
        text += f" Mean IoU on the split {data.validation_split} of {Path(str(data.validation_data)).name}: "
        text += f"{100 * metrics['eval_mean_iou']:.1f} %."
    return text


def run(trainer: MFuserTrainer, checkpoint: str | None):
    """Trains, from `checkpoint` if given. A checkpoint of the last step is loaded and not trained further."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        if 0 < trainer.args.max_steps <= state.global_step:
            restore_weights(trainer.model, checkpoint)
            trainer.state.global_step = state.global_step
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        argument_parser().print_help()
        return 0
    try:
        model_options, data, training = parse_arguments(arguments)
        trainer = build_trainer(model_options, data, training)
    except (ValueError, FileNotFoundError) as error:
        print(f"mfuser train: {error}", file=sys.stderr)
        return 1
    run(trainer, checkpoint_to_resume(training))
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    if training.should_save:
        folder = Path(training.output_dir)
        write_model_card(folder, trainer.model.config, folder.resolve().name, about(trainer, data, metrics))
    if training.push_to_hub:
        trainer.push_to_hub()
    return 0


if __name__ == "__main__":
    sys.exit(main())
