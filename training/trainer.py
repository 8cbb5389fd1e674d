"""Training on Transformers' Trainer: the published recipe's optimizer and schedule, a validation score on the source
domain, and checkpoints that are whole and come back whole."""

import copy
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from mfuser.configuration_mfuser import MFuserConfig
from mfuser.data.augmentation import label_array
from mfuser.evaluation.metrics import MeanIoU
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.pretrained_mfuser import VFM_CLASSES, VLM_CLASSES, load_encoder, load_towers

logger = logging.getLogger(__name__)

# A checkpoint is written here and renamed once whole. The Hub upload leaves out what begins with an underscore.
UNFINISHED_FOLDER = "_unfinished"
TRAINER_STATE_FILE = "trainer_state.json"
# Which pretrained encoders belong to weights that were saved without them.
ENCODERS_FILE = "encoders.json"

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
LEVEL_AND_QUERY_EMBEDDINGS = (".decoder.level_embedding", ".decoder.query_position_embedding")


@dataclass
class MFuserTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with what the published recipe needs beyond them. The recipes in `recipes/` set the rest.

    Args:
        min_learning_rate (`float`): where the polynomial schedule ends.
        schedule_power (`float`): its power.
        warmup_start (`float`): the warm-up begins at this share of the schedule.
        decay_embeddings (`bool`): whether weight decay acts on the decoder's level and query embeddings, as in the
            published CLIP runs, or not, as in those of EVA02-CLIP and SigLIP.
        save_trainable_only (`bool`): write only what trains into checkpoints, and into the final model.
    """

    lr_scheduler_type: str = field(
        default="polynomial",
        metadata={"help": "polynomial: the published schedule (min_learning_rate, schedule_power, warmup_start)."},
    )
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Where the polynomial schedule ends."})
    schedule_power: float = field(default=0.9, metadata={"help": "Power of the polynomial schedule."})
    warmup_start: float = field(default=1e-6, metadata={"help": "Share of the schedule that the warm-up begins at."})
    decay_embeddings: bool = field(
        default=True, metadata={"help": "Whether weight decay acts on the decoder's level and query embeddings."}
    )
    save_trainable_only: bool = field(
        default=False,
        metadata={"help": "Write only what trains; load it again on top of the encoders that it was trained with."},
    )


def parameter_groups(model: nn.Module, weight_decay: float, decay_embeddings: bool = True) -> list[dict]:
    """The trainable parameters in two groups for AdamW: with weight decay, and without.

    Args:
        model: [`MFuserForSemanticSegmentation`], or that in a wrapper.
        weight_decay: of the first group. Norms (weights and biases) have none.
        decay_embeddings: whether the decoder's level and query embeddings have.

    Returns:
        Two dictionaries of `params` and `weight_decay`. Each trainable parameter is in exactly one of them.
    """
    exempt = {id(weight) for module in model.modules() if isinstance(module, NORMS) for weight in module.parameters()}
    if not decay_embeddings:
        exempt |= {
            id(weight) for name, weight in model.named_parameters() if f".{name}".endswith(LEVEL_AND_QUERY_EMBEDDINGS)
        }
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    if not trainable:
        raise ValueError("The model has no parameter that trains.")
    return [
        {"params": [weight for weight in trainable if id(weight) not in exempt], "weight_decay": weight_decay},
        {"params": [weight for weight in trainable if id(weight) in exempt], "weight_decay": 0.0},
    ]


class PolynomialSchedule:
    """Learning rate at a step, as a share of the base rate: mmcv's `poly` policy with linear warm-up, by step.

    The polynomial runs from step 0, under the warm-up; Transformers' own starts after it.

    Args:
        base: learning rate that the polynomial starts from.
        minimum: learning rate at `steps`.
        steps: length of the training.
        warmup_steps: the polynomial is scaled by a line that rises from `warmup_start` to 1 over these steps.
    """

    def __init__(
        self,
        base: float,
        minimum: float,
        steps: int,
        warmup_steps: int = 0,
        power: float = 0.9,
        warmup_start: float = 1e-6,
    ):
        if not 0 <= minimum <= base or base == 0:
            raise ValueError(f"the learning rate can't fall from {base} to {minimum}: give 0 <= minimum <= base")
        self.base, self.minimum, self.steps = base, minimum, steps
        self.warmup_steps, self.power, self.warmup_start = warmup_steps, power, warmup_start

    def __call__(self, step: int) -> float:
        remaining = max(0.0, 1 - step / self.steps)
        rate = (self.base - self.minimum) * remaining**self.power + self.minimum
        if step < self.warmup_steps:
            rate *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)
        return rate / self.base


class ValidationDataset(Dataset):
    """Images prepared by an image processor, one at a time, with their label maps at full size.

    Args:
        dataset (`datasets.Dataset`): rows of `image` and `label`, as `load_domain` opens it.
        image_processor ([`MFuserImageProcessor`]): resizes and normalises the images; labels are left alone.
    """

    def __init__(self, dataset, image_processor):
        self.dataset = dataset.select_columns(["image", "label"])
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.dataset[index]
        pixel_values = self.image_processor(row["image"], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(label_array(row["label"]).copy())}


def restore_weights(model: PreTrainedModel, folder: str | Path):
    """Loads a saved model's weights into `model`, and makes sure that everything that trains, and every buffer, came.

    The names of tensors in files are not those in memory: `from_pretrained` translates them, `load_state_dict` does
    not and would silently leave encoder weights as they are. Frozen weights that the folder doesn't hold
    (`save_trainable_only`) are left as they are, too, but on purpose.

    Raises:
        ValueError: weights that are missing, superfluous or of another shape; they are named.
    """
    loaded, report = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    problems = {
        "missing": sorted(set(report["missing_keys"]) - frozen),
        "not part of the model": sorted(report["unexpected_keys"]),
        "of another shape": sorted(name for name, *_ in report["mismatched_keys"]),
    }
    problems = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if problems:
        raise ValueError(f"The weights in {folder} don't fit the model; {'; '.join(problems)}")
    state = {name: value for name, value in loaded.state_dict().items() if name not in report["missing_keys"]}
    model.load_state_dict(state, strict=False)


def load_trained_model(name_or_path: str, **config_fields) -> MFuserForSemanticSegmentation:
    """A saved model in float32, also one saved with `save_trainable_only`: on top of the encoders that it names.

    Args:
        name_or_path: folder, or for a model saved whole, Hub id.
        config_fields: fields of its [`MFuserConfig`] to change.
    """
    encoders = Path(name_or_path, ENCODERS_FILE)
    if not encoders.is_file():
        return MFuserForSemanticSegmentation.from_pretrained(name_or_path, dtype=torch.float32, **config_fields)
    names = json.loads(encoders.read_text(encoding="utf-8"))
    model = MFuserForSemanticSegmentation(MFuserConfig.from_pretrained(name_or_path, **config_fields))
    vfm = load_encoder(names["vfm"], VFM_CLASSES, "vision foundation model")
    load_towers(model.mfuser, vfm, load_encoder(names["vlm"], VLM_CLASSES, "vision-language model"))
    restore_weights(model, name_or_path)
    return model


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """`model` with BatchNorm layers whose statistics, in training, run over all processes. Needs an accelerator."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def without_scalars(model: nn.Module) -> list[str]:
    """Gives `model`'s scalar parameters one dimension, for FSDP shards no scalars. Returns their names."""
    names = [name for name, weight in model.named_parameters() if weight.dim() == 0]
    for name in names:
        module, _, attribute = name.rpartition(".")
        weight = getattr(model.get_submodule(module), attribute)
        one_dimensional = nn.Parameter(weight.detach().reshape(1), requires_grad=weight.requires_grad)
        setattr(model.get_submodule(module), attribute, one_dimensional)
    return names


class _SetEpoch(TrainerCallback):
    """Tells the sampler of each new epoch, whatever data loaders are wrapped around it."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class MFuserTrainer(Trainer):
    """[`Trainer`] for MFuser. Differences:

    - AdamW groups and schedule of the published recipe ([`parameter_groups`], [`PolynomialSchedule`]).
    - The parts of the loss are logged, as means since the last log: `loss_class`, `loss_mask`, `loss_dice`, summed
      over the decoder's predictions, and `loss_score_map`.
    - Evaluation streams a confusion matrix, image by image, exact over several processes: `eval_mean_iou`,
      `eval_overall_accuracy`, `eval_iou_<class>`. Logits are never collected.
    - A checkpoint folder has its name only once it is whole, and resuming, like loading the best model, restores every
      tensor ([`restore_weights`]).
    - BatchNorm is synchronised where several accelerators train together.
    - Under FSDP (recipes/fsdp.yaml) there is no evaluation: images of different size would make processes wait for
      each other for ever.

    Args:
        model ([`MFuserForSemanticSegmentation`])
        args ([`MFuserTrainingArguments`])
        train_dataset ([`~mfuser.data.augmentation.AugmentedDataset`])
        train_sampler: yields the draws, [`~mfuser.data.augmentation.ShuffledSampler`] or
            [`~mfuser.data.rare_class_sampling.RareClassSampler`].
        eval_dataset ([`ValidationDataset`], *optional*): of the source domain, for it selects the best checkpoint.
        encoders (`dict`, *optional*): folder or Hub id of the pretrained `vfm` and `vlm`; saved beside weights that
            are saved without them.
        kwargs: as for [`Trainer`].
    """

    def __init__(
        self,
        model: MFuserForSemanticSegmentation,
        args: MFuserTrainingArguments,
        train_dataset: Dataset | None = None,
        train_sampler=None,
        eval_dataset: Dataset | None = None,
        encoders: dict[str, str] | None = None,
        **kwargs,
    ):
        if args.save_trainable_only and encoders is None and model.config.freeze_encoders:
            raise ValueError("save_trainable_only leaves out the frozen encoders: say which they are (vfm and vlm)")
        if args.parallel_mode.value == "distributed" and args.device.type != "cpu":
            model = synchronise_batch_norm(model)
        self.train_sampler, self.encoders = train_sampler, encoders
        self._staging_folder = None
        self._loss_sums, self._loss_count = {}, 0
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if self.is_fsdp_enabled and eval_dataset is not None:
            raise ValueError("under FSDP nothing can be evaluated in training: leave validation_data out")
        self._scalars = without_scalars(self.model) if self.is_fsdp_enabled else []
        if train_sampler is not None:
            self.add_callback(_SetEpoch(train_sampler))

    # --- data --------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Images one by one, as their sizes may differ, and every image in one process only."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        share = range(self.args.process_index, len(eval_dataset), self.args.world_size)
        return DataLoader(Subset(eval_dataset, share), batch_size=1, num_workers=self.args.dataloader_num_workers)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    # --- optimization ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.args.weight_decay, self.args.decay_embeddings)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.args.lr_scheduler_type != "polynomial":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            schedule = PolynomialSchedule(
                self.args.learning_rate,
                self.args.min_learning_rate,
                num_training_steps,
                self.args.get_warmup_steps(num_training_steps),
                self.args.schedule_power,
                self.args.warmup_start,
            )
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, part in outputs.loss_components.items():
            kind = name.rstrip("0123456789").rstrip("_")
            self._loss_sums[kind] = self._loss_sums.get(kind, 0) + part.detach()
        self._loss_count += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loss_count:
            means = torch.stack(list(self._loss_sums.values())) / self._loss_count
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs |= {f"loss_{kind}": mean for kind, mean in zip(self._loss_sums, means, strict=True)}
            self._loss_sums, self._loss_count = {}, 0
        super().log(logs, start_time)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean IoU at the labels' size. Memory doesn't grow with the number of images; nothing is predicted twice."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        metric = MeanIoU(model.config.num_labels, model.config.semantic_loss_ignore_index, device=self.args.device)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                scores = model(pixel_values=batch["pixel_values"]).logits
            size = batch["labels"].shape[-2:]
            if scores.shape[-2:] != size:
                scores = nn.functional.interpolate(scores, size=size, mode="bilinear", align_corners=False)
            metric.update(scores.argmax(dim=1), batch["labels"])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        scores = metric.reduce(self.accelerator).compute()
        metrics = {
            f"{metric_key_prefix}_mean_iou": scores["mean_iou"],
            f"{metric_key_prefix}_overall_accuracy": scores["overall_accuracy"],
        }
        for index, iou in enumerate(scores["per_category_iou"].tolist()):
            metrics[f"{metric_key_prefix}_iou_{model.config.id2label[index]}"] = iou
        num_samples = len(self.eval_dataset) if self.eval_dataset is not None else len(dataloader)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_samples)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging_folder is None else str(self._staging_folder)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging, final = folder / UNFINISHED_FOLDER, folder / name
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while saving
        self.accelerator.wait_for_everyone()
        self._staging_folder = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging_folder = None
        self.accelerator.wait_for_everyone()
        is_best = self.state.best_model_checkpoint == str(staging / name)
        if is_best:
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / TRAINER_STATE_FILE))
            for file in filter(Path.is_file, staging.rglob("*")):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            shutil.rmtree(final, ignore_errors=True)  # the same step of an earlier run
            os.replace(staging / name, final)
            staging.rmdir()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging_folder is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._scalars and state_dict is not None:
            state_dict |= {name: state_dict[name].reshape(()) for name in self._scalars}
        if self.args.save_trainable_only:
            model = self.accelerator.unwrap_model(self.model)
            frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
            state_dict = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in state_dict.items() if name not in frozen}
        super()._save(output_dir, state_dict)
        if self.args.save_trainable_only and self.encoders and self.args.should_save:
            names = json.dumps(self.encoders, indent=2) + "\n"
            Path(output_dir or self.args.output_dir, ENCODERS_FILE).write_text(names, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_weights(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            logger.info("Loading the best model, %s", self.state.best_model_checkpoint)
            restore_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def create_model_card(self, *args, **kwargs):
        """Keeps a model card that is already there; without one, [`Trainer`]'s."""
        if not Path(self.args.output_dir, "README.md").exists():
            super().create_model_card(*args, **kwargs)


__all__ = [
    "MFuserTrainer",
    "MFuserTrainingArguments",
    "PolynomialSchedule",
    "ValidationDataset",
    "load_trained_model",
    "parameter_groups",
    "restore_weights",
    "synchronise_batch_norm",
]
