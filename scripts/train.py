"""Trains a model as a recipe says.

    mfuser train recipes/gta5_clip.yaml --train_data data/gta5 --validation_data data/gta5 --output_dir runs/gta5-clip

A recipe is a YAML file of settings, over those of the recipe that it names as `base`. Each can be given anew, as
`--name value` or `name=value`, parts of `model_config` as `model_config.crop_size=256`. `mfuser train --help` lists
them, with those of Transformers' Trainer. With `--resume true` the same command continues an interrupted run from its
last whole checkpoint. Over several devices: `accelerate launch -m mfuser.scripts.train recipes/gta5_clip.yaml ...`
"""

import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mfuser.configuration_mfuser import MFuserConfig
from mfuser.data.augmentation import AugmentedDataset, ShuffledSampler, TrainingAugmentation
from mfuser.data.loading import load_domain
from mfuser.data.rare_class_sampling import RareClassSampler, count_class_pixels
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts.model_card import write_model_card
from mfuser.training.trainer import (
    ENCODERS_FILE,
    TRAINER_STATE_FILE,
    MFuserTrainer,
    MFuserTrainingArguments,
    ValidationDataset,
    load_trained_model,
    restore_weights,
)


@dataclass
class ModelArguments:
    """What is trained: one of `model`, `vfm` with `vlm`, or `model_config`."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of an MFuser to train further."})
    vfm: str | None = field(default=None, metadata={"help": "Folder or Hub id of the vision foundation model."})
    vlm: str | None = field(default=None, metadata={"help": "Folder or Hub id of the vision-language model."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "The vision-language model's tokenizer, if it is not beside it."}
    )
    model_config: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Fields of MFuserConfig. With neither `model` nor `vfm` and `vlm`, a model of random weights has "
            "them; the class names come from the training data."
        },
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    train_data: str | None = field(
        default=None,
        metadata={"help": "Folder written by `mfuser prepare`, parquet files, or a dataset's Hub id or folder."},
    )
    train_split: str | None = field(default="train", metadata={"help": "Its split."})
    validation_data: str | None = field(
        default=None,
        metadata={"help": "The like, to choose the best checkpoint by: the source domain, never a target domain."},
    )
    validation_split: str | None = field(default="validation", metadata={"help": "Its split."})
    validation_size: dict[str, int] | None = field(
        default=None,
        metadata={"help": "What validation images are resized to, a size as of MFuserImageProcessor."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the label maps: class ids, 255 ignored."})
    id2label: str | None = field(
        default=None,
        metadata={"help": "JSON file of class names by id, or a domain's name, if the data has none."},
    )
    augmentation: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Arguments of TrainingAugmentation; by default the published, and the model's crop_size."},
    )
    rare_class_sampling: bool = field(default=True, metadata={"help": "Draw images of rare classes more often."})
    rare_class_temperature: float = field(default=100.0, metadata={"help": "The higher, the more evenly."})
    rare_class_min_pixels: int = field(
        default=3000, metadata={"help": "Pixels of a class that an image must hold to be drawn for it."}
    )


@dataclass
class TrainArguments(MFuserTrainingArguments):
    resume: str | None = field(
        default=None, metadata={"help": "true: continue from output_dir's last checkpoint, if any; or a checkpoint."}
    )


class SettingsLoader(yaml.SafeLoader):
    """YAML, where numbers and booleans are those of YAML 1.2: `1e-4` is a number, `no` a word."""


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
    """A recipe's settings over those of its `base`, a recipe beside it."""
    if not recipe.is_file():
        raise ValueError(f"{recipe} is no file; the recipes are in {Path(__file__).parents[1] / 'recipes'}")
    settings = yaml.load(recipe.read_text(encoding="utf-8"), SettingsLoader)
    if not isinstance(settings, dict):
        raise ValueError(f"{recipe} must hold settings, one a line, as in `learning_rate: 1.0e-4`")
    base = settings.pop("base", None)
    return (read_recipe(recipe.with_name(base)) if base else {}) | settings


def read_settings(arguments: list[str]) -> dict[str, Any]:
    """The settings of a recipe, if one is named, with those of the command line over them.

    Raises:
        ValueError: an argument that is no setting, or a recipe that is no mapping.
    """
    settings, arguments = {}, list(arguments)
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        settings = read_recipe(Path(arguments.pop(0)))
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if not equals:
            if not name.startswith("--"):
                raise ValueError(f"{name} is no setting; give settings as --name value or name=value")
            if not arguments:
                raise ValueError(f"{name} needs a value")
            value = arguments.pop(0)
        *path, name = name.removeprefix("--").split(".")
        target = settings
        for part in path:
            target = target.setdefault(part, {})
        target[name] = yaml.load(value, SettingsLoader)
    return settings


def build_model(options: ModelArguments, id2label: dict[int, str]) -> MFuserForSemanticSegmentation:
    """The model that the options name, for these classes.

    Raises:
        ValueError: none or several ways to a model are given, or a saved model has other classes than the data.
    """
    ways = [bool(options.model), bool(options.vfm or options.vlm)]
    if sum(ways) > 1 or bool(options.vfm) != bool(options.vlm):
        raise ValueError("give either `model`, or both `vfm` and `vlm`, or only `model_config`")
    class_names = list(id2label.values())
    if options.model:
        model = load_trained_model(options.model, **options.model_config)
        known = list(model.config.id2label.values())
        if known != class_names:
            raise ValueError(
                f"{options.model} has the classes {', '.join(known)}; the data has {', '.join(class_names)}"
            )
        return model
    if options.vfm:
        return MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
            options.vfm, options.vlm, class_names=class_names, tokenizer=options.tokenizer, **options.model_config
        )
    if not options.model_config:
        raise ValueError("say what to train: `model`, or `vfm` and `vlm`, or `model_config`")
    label2id = {name: index for index, name in id2label.items()}
    return MFuserForSemanticSegmentation(MFuserConfig(id2label=id2label, label2id=label2id, **options.model_config))


def encoders_of(options: ModelArguments) -> dict[str, str] | None:
    """The pretrained encoders of the model that the options name, where known."""
    if options.vfm:
        return {"vfm": options.vfm, "vlm": options.vlm}
    known = options.model and Path(options.model, ENCODERS_FILE)
    return json.loads(known.read_text(encoding="utf-8")) if known and known.is_file() else None


def build_trainer(model_options: ModelArguments, data: DataArguments, training: TrainArguments) -> MFuserTrainer:
    if data.train_data is None:
        raise ValueError("say what to train on: --train_data FOLDER (see `mfuser prepare`)")
    columns = {"image_column": data.image_column, "label_column": data.label_column, "id2label": data.id2label}
    with training.main_process_first(desc="opening the data"):
        train = load_domain(data.train_data, data.train_split, **columns)
        validation = data.validation_data and load_domain(data.validation_data, data.validation_split, **columns)
        if validation and validation.id2label != train.id2label:
            raise ValueError(f"{data.train_data} and {data.validation_data} have different classes")
        if data.rare_class_sampling:
            counts = count_class_pixels(train.dataset, len(train.id2label))
            sampler = RareClassSampler(
                counts,
                seed=training.seed,
                temperature=data.rare_class_temperature,
                min_pixels=data.rare_class_min_pixels,
            )
        else:
            sampler = ShuffledSampler(len(train.dataset), seed=training.seed)
    set_seed(training.seed)
    model = build_model(model_options, train.id2label)
    # save_pretrained names only the saved class; the base model loads from the same folder
    model.config.auto_map = {"AutoModel": "modeling_mfuser.MFuserModel"}
    augmentation = TrainingAugmentation(**{"crop_size": model.config.crop_size, **data.augmentation})
    processor = MFuserImageProcessor(**({"size": data.validation_size} if data.validation_size else {}))
    return MFuserTrainer(
        model,
        training,
        train_dataset=AugmentedDataset(train.dataset, augmentation, seed=training.seed),
        train_sampler=sampler,
        eval_dataset=ValidationDataset(validation.dataset, processor) if validation else None,
        encoders=encoders_of(model_options),
        processing_class=processor,
    )


def checkpoint_to_resume(training: TrainArguments) -> str | None:
    """What `resume` asks for: a named checkpoint, or output_dir's last whole one if there is any."""
    if training.resume in (None, False):
        return None
    if training.resume is not True:
        return training.resume
    return get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None


def about(trainer: MFuserTrainer, data: DataArguments, metrics: dict[str, float]) -> str:
    """The paragraph of the model card that says how the weights came about."""
    steps, batch = trainer.state.global_step, trainer.args.train_batch_size * trainer.args.world_size
    batch *= trainer.args.gradient_accumulation_steps
    text = f"Trained by `mfuser train` on {Path(data.train_data).name}, split {data.train_split}: {steps} steps of "
    text += f"{batch} crops of {trainer.train_dataset.augmentation.crop_size} pixels, learning rate "
    text += f"{trainer.args.learning_rate:g}."
    if "eval_mean_iou" in metrics:
        text += f" Mean IoU on the split {data.validation_split} of {Path(data.validation_data).name}: "
        text += f"{100 * metrics['eval_mean_iou']:.1f} %."
    return text


def run(trainer: MFuserTrainer, checkpoint: str | None):
    """Trains, from a checkpoint on if there is one; does nothing more than load one that is the last."""
    if checkpoint is not None:
        state = json.loads(Path(checkpoint, TRAINER_STATE_FILE).read_text(encoding="utf-8"))
        if 0 < trainer.args.max_steps <= state["global_step"]:
            restore_weights(trainer.model, checkpoint)
            trainer.state.global_step = state["global_step"]
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainArguments), prog="mfuser train", description=__doc__, add_help=True
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    try:
        settings = read_settings(arguments)
        known = {item.name for kind in parser.dataclass_types for item in dataclasses.fields(kind)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"no such setting: {', '.join(unknown)} (mfuser train --help lists them)")
        model_options, data, training = parser.parse_dict(settings)
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
