"""
Trains a model with the settings of a recipe.

    mfuser train recipes/gta5_clip.yaml --train_data data/gta5 --validation_data data/gta5 --output_dir runs/gta5-clip

A recipe is a YAML file of settings. The settings of a recipe that it names as `base` apply as well, unless the recipe
overrides them. The command line overrides both, with `--name value` or `name=value`, and with
`model_config.crop_size=256` for a single field of `model_config`. `mfuser train --help` lists the settings, including
those of Transformers' Trainer. With `--resume true`, the same command continues an interrupted run from its last
complete checkpoint. `accelerate launch -m mfuser.scripts.train recipes/gta5_clip.yaml ...` trains on several devices.
"""

import contextlib
import functools
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file, logging

from mfuser.class_names_mfuser import IGNORE_INDEX, give_classes, label_names, pretrained_tokenizer
from mfuser.configuration_mfuser import MFuserConfig
from mfuser.data.augmentation import AugmentedDataset, TrainingAugmentation
from mfuser.data.draws import DrawSampler, ShuffledSampler
from mfuser.data.loading import LoadedDomain, load_domain, parse_id2label
from mfuser.data.rare_class_sampling import RareClassSampler, count_class_pixels
from mfuser.data.sources import MultiSourceDataset, TrainingSource, joint_classes, multi_source_sampler
from mfuser.data.validation import ValidationDataset
from mfuser.encoder_configs_mfuser import DEFAULT_ENCODERS
from mfuser.frozen_encoders_mfuser import located, recorded_encoders
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.loading import load_model, restore_weights, saved_encoders
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts import cli
from mfuser.scripts.model_card import write_model_card
from mfuser.scripts.train_arguments import (
    PAIRING_ARGUMENTS,
    DataArguments,
    ModelArguments,
    TrainArguments,
    argument_parser,
    parse_arguments,
)
from mfuser.training.checkpoints import restore_replaced
from mfuser.training.monitoring import check_validation_source, open_monitored_domains
from mfuser.training.run_folders import (
    check_checkpoint,
    check_output_dir,
    checkpoint_to_resume,
    locked,
    remove_earlier_run,
)
from mfuser.training.run_record import RECORD_FILE, check_record, describe_data, run_record, with_length
from mfuser.training.trainer import MFuserTrainer

# The settings of the data that determine the result of a run, in addition to the data itself.
RECORDED_DATA_SETTINGS = (
    *("train_weights", "mask_unlabelled_classes", "validation_size", "rare_class_sampling"),
    *("rare_class_scope", "rare_class_temperature", "rare_class_min_pixels"),
)

logger = logging.get_logger("transformers.mfuser.train")


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
        ValueError: If the options describe no model, or the classes of the data cannot be given to a saved model.
    """
    class_names = list(id2label.values())
    fields = model_fields_for(options, class_names)
    if options.model:
        try:
            model = load_model(options.model, dtype=torch.float32, **fields)
        except RuntimeError as error:  # raised by Transformers for weights of another shape
            raise ValueError(f"{options.model} does not fit model_config: {error}") from error
        if model.config.semantic_loss_ignore_index != IGNORE_INDEX:
            raise ValueError(
                f"{options.model} has semantic_loss_ignore_index {model.config.semantic_loss_ignore_index}; ignored "
                f"pixels of the data have the label {IGNORE_INDEX}: set model_config.semantic_loss_ignore_index="
                f"{IGNORE_INDEX}"
            )
        if class_names != label_names(model.config.id2label):
            tokenizer = options.tokenizer or (encoders_of(options) or {}).get("vlm")
            logger.warning(
                f"{options.model} is trained on other classes; {give_classes(model, class_names, tokenizer)}"
            )
        return model
    if options.vfm and options.vlm:
        return MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
            options.vfm,
            options.vlm,
            class_names=class_names,
            tokenizer=options.tokenizer,
            vfm_revision=options.vfm_revision,
            vlm_revision=options.vlm_revision,
            **fields,
        )
    if not fields:
        raise ValueError("no model is given; give `model`, or `vfm` and `vlm`, or `model_config`")
    label2id = {name: index for index, name in id2label.items()}
    return MFuserForSemanticSegmentation(MFuserConfig(id2label=id2label, label2id=label2id, **fields))


def model_fields_for(options: ModelArguments, class_names: list[str]) -> dict[str, Any]:
    """
    The setting `model_config` without the classes, which are those of the data.

    Raises:
        ValueError: If it contradicts the classes of the data, or holds fields that the encoders determine.
    """
    fields = dict(options.model_config)
    given = {name: fields.pop(name, None) for name in ("num_labels", "id2label", "label2id")}
    if given["num_labels"] not in (None, len(class_names)):
        raise ValueError(
            f"model_config.num_labels is {given['num_labels']}; the training data has {len(class_names)} classes "
            f"({', '.join(class_names)})"
        )
    if given["id2label"] is not None and list(parse_id2label(given["id2label"]).values()) != class_names:
        raise ValueError(
            f"model_config.id2label is {given['id2label']}; the training data has the classes {', '.join(class_names)}"
        )
    if given["label2id"] not in (None, {name: index for index, name in enumerate(class_names)}):
        raise ValueError(
            f"model_config.label2id is {given['label2id']}; the training data has the classes {', '.join(class_names)}"
        )
    if options.vfm:
        reserved, reason = [*DEFAULT_ENCODERS, "class_token_ids"], "with `vfm` and `vlm`, whose own values are used"
    else:
        reserved, reason = list(PAIRING_ARGUMENTS), "without `vfm` and `vlm`, which it pairs"
    for name in reserved:
        if name in fields:
            raise ValueError(f"model_config.{name} cannot be set {reason}")
    return fields


def encoders_of(options: ModelArguments) -> dict[str, str] | None:
    """Folder or Hub id of the model's pretrained `vfm` and `vlm`, where known."""
    if options.vfm and options.vlm:
        return {"vfm": options.vfm, "vlm": options.vlm}
    return saved_encoders(options.model) if options.model else None


def sources_of(options: ModelArguments) -> dict[str, Any] | None:
    """For each encoder, folder or Hub id and, of a Hub id, the commit that was downloaded."""
    if options.model:
        return recorded_encoders(options.model)
    sources = {}
    for key, name in (encoders_of(options) or {}).items():
        _, commit = located(name, revision=getattr(options, f"{key}_revision"))
        sources[key] = {"name_or_path": name, "revision": commit}
    return sources or None


def tokenizer_of(model: MFuserForSemanticSegmentation, options: ModelArguments) -> Any:
    """The tokenizer of the model's text encoder, where it has one and its tokenizer is known."""
    if not model.config.use_text_encoder:
        return None
    if options.tokenizer:
        return pretrained_tokenizer(options.tokenizer)
    places = {options.model: None, (encoders_of(options) or {}).get("vlm"): options.vlm_revision}
    for place, revision in places.items():
        if place is None:
            continue
        try:
            return pretrained_tokenizer(place, revision=revision)
        except (OSError, ValueError) as error:
            logger.info(f"{place} has no tokenizer ({error}).")
    return None


def build_processor(model: str | None, data: DataArguments) -> MFuserImageProcessor:
    """
    The image processor of validation, monitoring and the saved model, whose mean and deviation training uses as well.

    It is that of `model`, if there is one, with `validation_size` and the mean and deviation of `augmentation`.

    Raises:
        ValueError: If a setting of it is invalid, or images of training cannot be prepared in the same way.
    """
    names = ("image_mean", "image_std")
    changes: dict[str, Any] = {
        name: [float(value) for value in data.augmentation[name]] for name in names if name in data.augmentation
    }
    if data.validation_size:
        changes["size"] = data.validation_size
    if model is None or cached_file(model, IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False) is None:
        return MFuserImageProcessor(**changes)
    processor = MFuserImageProcessor.from_pretrained(model, **changes)
    for name in ("do_rescale", "rescale_factor", "do_normalize"):
        if getattr(processor, name) != getattr(MFuserImageProcessor, name):
            raise ValueError(
                f"the image processor of {model} has {name} {getattr(processor, name)}; it must be "
                f"{getattr(MFuserImageProcessor, name)}, as in training"
            )
    for name in names:  # a single number is that of all channels
        setattr(processor, name, np.broadcast_to(getattr(processor, name), 3).tolist())
    return processor


def build_sampler(sources: list[TrainingSource], data: DataArguments, seed: int) -> DrawSampler:
    """The sampler of the sources. Counts the pixels of each class first if rare classes are drawn more often."""
    rare_classes: dict[str, Any] = {
        "temperature": data.rare_class_temperature,
        "min_pixels": data.rare_class_min_pixels,
    }
    if len(sources) > 1:
        scope = data.rare_class_scope if data.rare_class_sampling else None
        return multi_source_sampler(sources, data.train_weights, seed, scope, data.skip_unreadable, **rare_classes)
    if not data.rare_class_sampling:
        return ShuffledSampler(len(sources[0].dataset), seed=seed)
    counts = count_class_pixels(sources[0].dataset, len(sources[0].id2label), skip_unreadable=data.skip_unreadable)
    return RareClassSampler(counts, seed=seed, **rare_classes)


def build_dataset(
    sources: list[TrainingSource], augmentation: TrainingAugmentation, data: DataArguments, seed: int
) -> AugmentedDataset | MultiSourceDataset:
    """The dataset of the sources, whose samples are augmented."""
    if len(sources) > 1:
        return MultiSourceDataset(sources, augmentation, seed, data.mask_unlabelled_classes, data.skip_unreadable)
    num_labels = len(sources[0].id2label)
    return AugmentedDataset(sources[0].dataset, augmentation, seed, num_labels, data.skip_unreadable)


def described_data(
    data: DataArguments, sources: list[TrainingSource], validation: LoadedDomain | None
) -> dict[str, Any]:
    """Place, split and content of each dataset, for the record of the run."""
    opened = enumerate(zip(data.train_data or (), data.train_split or (), sources, strict=True))
    described = {
        "train_data" if len(sources) == 1 else f"train_data[{index}]": describe_data(place, split, source.dataset)
        for index, (place, split, source) in opened
    }
    if validation:
        place = str(data.validation_data)
        described["validation_data"] = describe_data(place, data.validation_split, validation.dataset)
    return described


def build_trainer(model_options: ModelArguments, data: DataArguments, training: TrainArguments) -> MFuserTrainer:
    """
    Opens the data, builds the model and returns the trainer of both.

    Raises:
        ValueError: If `train_data` is missing, or classes of data and model differ.
    """
    if not data.train_data:
        raise ValueError("train_data is missing; give a folder written by `mfuser prepare` as --train_data FOLDER")
    open_data = functools.partial(
        load_domain,
        image_column=data.image_column,
        label_column=data.label_column,
        id2label=data.id2label,
        skip_unreadable=data.skip_unreadable,
    )
    processor = build_processor(model_options.model, data)
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
    normalization = {"image_mean": tuple(processor.image_mean), "image_std": tuple(processor.image_std)}
    augmentation = TrainingAugmentation(**{"crop_size": model.config.crop_size, **data.augmentation, **normalization})
    eval_dataset = None
    if validation:
        eval_dataset = ValidationDataset(validation.dataset, processor, len(id2label), data.skip_unreadable)
    described = described_data(data, sources, validation)
    settings = {name: getattr(data, name) for name in RECORDED_DATA_SETTINGS} | {"augmentation": vars(augmentation)}
    return MFuserTrainer(
        model,
        training,
        train_dataset=build_dataset(sources, augmentation, data, training.seed),
        train_sampler=sampler,
        eval_dataset=eval_dataset,
        encoders=encoders_of(model_options),
        run_record=run_record(model, training, settings, described, sources_of(model_options)),
        tokenizer=tokenizer_of(model, model_options),
        monitored=monitored,
        processing_class=processor,
    )


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
    for before, after in pairwise((trainer.run_record or {}).get("lengths", ())):
        text += f" The run was extended at step {after['from_step']} from {before['max_steps']} to "
        text += f"{after['max_steps']} steps; the learning rates are those of the new length from there on."
    if skipped := trainer.skipped_rows():
        text += f" {skipped} images could not be read and were skipped."
    if "eval_mean_iou" in metrics:
        text += f" Mean IoU on the split {data.validation_split} of {Path(str(data.validation_data)).name}: "
        text += f"{100 * metrics['eval_mean_iou']:.1f} %."
    return text


def run(trainer: MFuserTrainer, checkpoint: str | None):
    """
    Trains, from `checkpoint` if given. A checkpoint of the last step is not trained further; its weights, or with
    `load_best_model_at_end` those of the best checkpoint, are loaded.

    Raises:
        ValueError: If the checkpoint belongs to another run, or `max_steps` is smaller than its step.
    """
    if checkpoint is None:
        train(trainer)
        return
    check_checkpoint(checkpoint)
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    if trainer.run_record is not None:
        saved = check_record(checkpoint, trainer.run_record)
        if saved is None:
            logger.warning(f"{checkpoint} has no {RECORD_FILE}, so it is unknown whether it belongs to this run.")
        trainer.run_record = with_length(trainer.run_record, saved, state.global_step)
    if 0 < trainer.args.max_steps < state.global_step:
        raise ValueError(
            f"max_steps is {trainer.args.max_steps}; {checkpoint} is already at step {state.global_step}, so it must "
            "be at least that"
        )
    if trainer.args.max_steps == state.global_step:
        best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        if best is not None and not Path(best).is_dir():
            logger.warning(f"the best checkpoint, {best}, does not exist; the model is that of the last step.")
            best = None
        restore_weights(trainer.model, best or checkpoint)
        trainer.state.global_step = state.global_step
        return
    train(trainer, checkpoint)


def train(trainer: MFuserTrainer, checkpoint: str | None = None):
    """Trains. An error in a worker process is raised with its original message, without the worker's traceback."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        worker = re.match(
            r"Caught \w+ in DataLoader worker .*^[\w.]*Error: (.*)\Z", str(error), re.DOTALL | re.MULTILINE
        )
        if worker is None:
            raise
        raise ValueError(worker[1]) from error


@cli.reports_errors("train")
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        argument_parser().print_help()
        return 0
    model_options, data, training = parse_arguments(arguments)
    folder = Path(training.output_dir)
    check_output_dir(folder, training.resume, training.overwrite_output_dir)
    trainer = build_trainer(model_options, data, training)
    with contextlib.ExitStack() as held:
        with training.main_process_first(desc="preparing output_dir"):
            if training.process_index == 0:
                held.enter_context(locked(folder))
                check_output_dir(folder, training.resume, training.overwrite_output_dir)  # again, now that it is ours
                restore_replaced(folder)
                if training.overwrite_output_dir:
                    remove_earlier_run(folder)
            checkpoint = checkpoint_to_resume(folder, training.resume)
        run(trainer, checkpoint)
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        trainer.save_model()
        if training.should_save:
            write_model_card(folder, trainer.model.config, folder.resolve().name, about(trainer, data, metrics))
        if training.push_to_hub:
            trainer.push_to_hub()
    return 0


if __name__ == "__main__":
    sys.exit(main())
