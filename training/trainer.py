"""Training on Transformers' Trainer: the published recipe, validation on the source domain, and whole checkpoints."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints

from mfuser.data.validation import ValidationDataset
from mfuser.evaluation.metrics import MeanIoU
from mfuser.evaluation.trainer_metrics import named_scores, preprocess_logits_for_metrics
from mfuser.files import write_text
from mfuser.loading import ENCODERS_FILE
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.training.checkpoints import UNFINISHED_FOLDER, accept_saved_names, publish, without_scalars
from mfuser.training.monitoring import PREFIX, MonitorCallback, check_selection, training_state_preserved
from mfuser.training.optimization import PolynomialSchedule, parameter_groups


@dataclass
class MFuserTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the settings that the published recipe needs in addition.

    Args:
        lr_scheduler_type (`str`, *optional*, defaults to `"polynomial"`):
            The published schedule, [`~mfuser.training.optimization.PolynomialSchedule`], or one of Transformers'.
        min_learning_rate (`float`, *optional*, defaults to 1e-6):
            Learning rate at the end of the polynomial schedule.
        schedule_power (`float`, *optional*, defaults to 0.9):
            Power of the polynomial schedule.
        warmup_start (`float`, *optional*, defaults to 1e-6):
            Factor of the learning rate at the start of the warm-up.
        decay_embeddings (`bool`, *optional*, defaults to `True`):
            Whether weight decay acts on the decoder's level and query embeddings. It does in the published CLIP runs
            and does not in those of EVA02-CLIP and SigLIP.
        decay_norms (`bool`, *optional*, defaults to `True`):
            Whether weight decay acts on BatchNorm, GroupNorm and four LayerNorms of the MTEnhancer, as in the
            published code, or on no normalisation layer.
        save_trainable_only (`bool`, *optional*, defaults to `False`):
            Whether checkpoints and the final model leave out the frozen weights.
        monitor_steps (`int`, *optional*, defaults to 500):
            Number of steps between two scorings of the monitored domains, independent of `eval_steps`.
    """

    lr_scheduler_type: str = field(
        default="polynomial",
        metadata={
            "help": "Learning-rate schedule: polynomial is the published one (min_learning_rate, schedule_power, "
            "warmup_start); the others are Transformers'."
        },
    )
    min_learning_rate: float = field(
        default=1e-6, metadata={"help": "Learning rate at the end of the polynomial schedule."}
    )
    schedule_power: float = field(default=0.9, metadata={"help": "Power of the polynomial schedule."})
    warmup_start: float = field(
        default=1e-6, metadata={"help": "Factor of the learning rate at the start of the warm-up."}
    )
    decay_embeddings: bool = field(
        default=True, metadata={"help": "Whether weight decay acts on the decoder's level and query embeddings."}
    )
    decay_norms: bool = field(
        default=True,
        metadata={
            "help": "Whether weight decay acts on BatchNorm, GroupNorm and four LayerNorms of the MTEnhancer, as in "
            "the published code."
        },
    )
    save_trainable_only: bool = field(
        default=False,
        metadata={"help": "Leave the frozen encoders out of checkpoints and of the final model."},
    )
    monitor_steps: int = field(
        default=500,
        metadata={"help": "Number of steps between two scorings of the monitored domains, independent of eval_steps."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.monitor_steps < 1:
            raise ValueError(f"monitor_steps is {self.monitor_steps}; it must be at least 1")


class _SetEpoch(TrainerCallback):
    """Sets the sampler's epoch, which Trainer does not do for every way in which a data loader is prepared."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class MFuserTrainer(Trainer):
    """
    [`Trainer`] for MFuser, with these differences:

    - AdamW groups and schedule of the published recipe ([`~mfuser.training.optimization.parameter_groups`],
      [`~mfuser.training.optimization.PolynomialSchedule`]).
    - The parts of the loss are logged, as means since the last log: `loss_class`, `loss_mask` and `loss_dice`, each
      summed over the decoder's predictions, and `loss_score_map`.
    - Evaluation accumulates a confusion matrix, image by image, and is exact over several processes:
      `eval_mean_iou`, `eval_overall_accuracy`, `eval_iou_<class>`. Logits are not collected. With several validation
      sets, their names follow "eval", as in [`Trainer`].
    - Target domains can be monitored: every `monitor_steps` steps their mean IoU is logged as
      `monitor_<name>_mean_iou`. It cannot select the best checkpoint, and training is bit-equal without it.
    - A checkpoint folder gets its name when it is complete. Resuming and loading the best model restore every tensor
      ([`~mfuser.training.checkpoints.accept_saved_names`]).
    - BatchNorm is synchronised when several accelerators train together.
    - There is no evaluation under FSDP (recipes/fsdp.yaml): since images differ in size, processes would wait for
      each other forever.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model to train.
        args ([`MFuserTrainingArguments`]):
            The settings.
        train_dataset ([`~mfuser.data.augmentation.AugmentedDataset`], *optional*):
            The training samples.
        train_sampler (*optional*):
            The [`~mfuser.data.augmentation.ShuffledSampler`] or
            [`~mfuser.data.rare_class_sampling.RareClassSampler`] that yields the draws.
        eval_dataset ([`~mfuser.data.validation.ValidationDataset`] or a `dict` of them by name, *optional*):
            Validation images of the source domain, by which the best checkpoint is selected.
        encoders (`dict[str, str]`, *optional*):
            Folder or Hub id of the pretrained `vfm` and `vlm`, saved beside weights that are saved without them.
        monitored (`dict[str, Dataset]`, *optional*):
            Target domains to monitor, by name, such as [`~mfuser.training.monitoring.MonitoredDomain`].
        kwargs:
            Further arguments of [`Trainer`].
    """

    args: MFuserTrainingArguments
    control: TrainerControl
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler

    def __init__(
        self,
        model: MFuserForSemanticSegmentation,
        args: MFuserTrainingArguments,
        train_dataset: Dataset | None = None,
        train_sampler=None,
        eval_dataset: ValidationDataset | dict[str, ValidationDataset] | None = None,
        encoders: dict[str, str] | None = None,
        monitored: Mapping[str, Dataset] | None = None,
        **kwargs,
    ):
        if args.save_trainable_only and encoders is None and model.config.freeze_encoders:
            raise ValueError(
                "save_trainable_only leaves out the frozen encoders, and it is unknown which they are; pass "
                "encoders={'vfm': ..., 'vlm': ...} (`mfuser train`: vfm and vlm), or set save_trainable_only to false"
            )
        if train_dataset is not None:
            model.config.confidence_calibration = None  # it holds for the weights before the training
        self.monitored = dict(monitored or {})
        metrics = ["mean_iou", "overall_accuracy", *(f"iou_{name}" for name in model.config.id2label.values())]
        check_selection(args.metric_for_best_model, metrics, eval_dataset, self.monitored)
        if args.parallel_mode.value == "distributed" and args.device.type != "cpu":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.train_sampler, self.encoders = train_sampler, encoders
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_count = 0
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if self.is_fsdp_enabled and (eval_dataset is not None or self.monitored):
            raise ValueError(
                "evaluation during training is not possible under FSDP; leave validation_data and monitor_data out"
            )
        self._scalars = without_scalars(self.model) if self.is_fsdp_enabled else []
        # FSDP and DeepSpeed restore weights from separate files, with the names in memory.
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            accept_saved_names(self.model)
        if train_sampler is not None:
            self.add_callback(_SetEpoch(train_sampler))
        if self.monitored:
            self.add_callback(MonitorCallback(self))

    # --- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Returns the loader of the samples that `train_sampler` draws; without a sampler, [`Trainer`]'s."""
        if self.train_sampler is None:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset, and train_dataset is None")
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,  # args.train_batch_size, unless auto_find_batch_size lowers it
            sampler=self.train_sampler,
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """
        Returns a loader of this process's share of the images, one by one since their sizes may differ.

        Args:
            eval_dataset (`str` or `Dataset`, *optional*):
                The images, such as a [`~mfuser.data.validation.ValidationDataset`], or the name of one of several
                validation sets; by default the validation set.

        Raises:
            ValueError: If there is no validation set, or none of this name.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in named:
                raise ValueError(f"eval_dataset is {dataset!r}; the named validation sets are {list(named)}")
            dataset = named[dataset]
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset, and eval_dataset is None")
        if isinstance(dataset, dict):
            raise ValueError(f"there are several validation sets; name one of {list(dataset)}")
        share = range(self.args.process_index, len(dataset), self.args.world_size)
        # Without a generator, a loader draws the seed of its workers from the random numbers of training.
        return DataLoader(
            Subset(dataset, share),
            batch_size=1,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),
        )

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    # --- optimization ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.args.weight_decay, self.args.decay_embeddings, self.args.decay_norms)
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
        """Computes the mean IoU at the labels' size, with memory that does not grow with the number of images."""
        scores = self._score(dataloader, report_progress=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        dataset: Any = dataloader.dataset
        images: Any = dataset.dataset if isinstance(dataset, Subset) else dataset  # those of all processes
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(images))

    def _score(self, dataloader: DataLoader, report_progress: bool = False) -> dict[str, float]:
        """Mean IoU, overall accuracy and IoU per class over the images of all processes."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        metric = MeanIoU(model.config.num_labels, model.config.semantic_loss_ignore_index, device=self.args.device)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                scores = model(pixel_values=batch["pixel_values"]).logits
            metric.update(preprocess_logits_for_metrics(scores, batch["labels"]), batch["labels"])
            if report_progress:
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return named_scores(metric.reduce(self.accelerator).compute(), model.config.id2label)

    def monitor(self) -> dict[str, float]:
        """Scores the monitored domains, logs and returns `monitor_<name>_mean_iou`, and leaves training unchanged."""
        logs = {}
        with training_state_preserved(self.model):
            for name, dataset in self.monitored.items():
                logs[f"{PREFIX}_{name}_mean_iou"] = self._score(self.get_eval_dataloader(dataset))["mean_iou"]
        self.log(dict(logs))
        return logs

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model, the image processor and the training arguments.

        With `save_trainable_only`, frozen weights are left out and the encoders are named in `encoders.json`.
        """
        folder = Path(output_dir or self.args.output_dir)
        # Every process takes part in this: sharded weights are gathered.
        state_dict = self.accelerator.get_state_dict(self.model_wrapped if self.is_deepspeed_enabled else self.model)
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            state_dict |= {name: state_dict[name].reshape(()) for name in self._scalars}
            if self.args.save_trainable_only:
                frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
                state_dict = {name: value for name, value in state_dict.items() if name not in frozen}
            model.save_pretrained(folder, state_dict=state_dict)
            if self.args.save_trainable_only and self.encoders:
                write_text(folder / ENCODERS_FILE, json.dumps(self.encoders, indent=2) + "\n")
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        # Private in Trainer, which writes the files of a checkpoint one by one under the folder's final name. Its only
        # public hooks there are save_model, before most files are written, and on_save, after all are visible.
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        args, final = self.args, Path(self._get_output_dir(trial), name)
        staging = Path(args.output_dir, UNFINISHED_FOLDER)
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed while saving
        self.accelerator.wait_for_everyone()
        self.args = copy.copy(args)
        self.args.output_dir, self.args.push_to_hub = str(staging), False
        try:
            unfinished = Path(self._get_output_dir(trial), name)
            super()._save_checkpoint(model, trial)
        finally:
            self.args = args
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(final)
        if args.should_save:
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            torch.save(args, unfinished / TRAINING_ARGS_NAME)
            publish(unfinished, final)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def create_model_card(self, *args, **kwargs):
        """Creates a draft of a model card, unless there is a model card already."""
        if not Path(self.args.output_dir, "README.md").exists():
            super().create_model_card(*args, **kwargs)


__all__ = ["MFuserTrainer", "MFuserTrainingArguments"]
