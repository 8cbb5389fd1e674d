"""Training with Transformers' Trainer: the published recipe, validation on the source domain, atomic checkpoints."""

import contextlib
import copy
import json
import pickle
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import logging

from mfuser.data.validation import ValidationDataset
from mfuser.errors import is_expected, is_out_of_memory, one_line
from mfuser.evaluation.metrics import MeanIoU
from mfuser.evaluation.trainer_metrics import named_scores, preprocess_logits_for_metrics
from mfuser.files import write_text
from mfuser.frozen_encoders_mfuser import (
    checked_encoders,
    frozen_encoders,
    weights_without_encoders,
    write_encoders_file,
)
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.training.arguments import MFuserTrainingArguments
from mfuser.training.checkpoints import (
    UNFINISHED_FOLDER,
    accept_saved_names,
    publish,
    publish_files,
    rotate,
    unfinished,
    without_scalars,
)
from mfuser.training.finite import SkipNonFiniteSteps, check_finite
from mfuser.training.monitoring import (
    PREFIX,
    MonitorCallback,
    MonitoredDomain,
    check_selection,
    training_state_preserved,
)
from mfuser.training.optimization import PolynomialSchedule, parameter_groups, restart_schedule
from mfuser.training.run_record import RECORD_FILE

logger = logging.get_logger("transformers.mfuser.training")


class _SetEpoch(TrainerCallback):
    """Sets the epoch of the sampler, which Trainer does only for some kinds of data loaders."""

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
    - Target domains can be monitored: every `monitor_steps` steps and after the last one, their mean IoU is logged as
      `monitor_<name>_mean_iou`. It cannot select the best checkpoint, and training is bit-identical without it.
    - Checkpoints and the final model get their names when they are complete, and hold `run_record`. Resuming and
      loading the best model restore every tensor ([`~mfuser.training.checkpoints.accept_saved_names`]). A run that is
      resumed with another length has the learning rates of a run of that length from there on.
    - Steps with a loss or gradients that are not finite are skipped; `max_nonfinite_steps` in a row stop the training.
      Weights that are not finite are not saved.
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
            The [`~mfuser.data.draws.ShuffledSampler`] or
            [`~mfuser.data.rare_class_sampling.RareClassSampler`] that yields the draws.
        eval_dataset ([`~mfuser.data.validation.ValidationDataset`] or a `dict` of them by name, *optional*):
            Validation images of the source domain, by which the best checkpoint is selected.
        encoders (`dict[str, str]`, *optional*):
            Folder or Hub id of the pretrained `vfm` and `vlm`, for `save_trainable_only`; needed if the model was
            loaded from a folder that holds them.
        monitored (`dict[str, Dataset]`, *optional*):
            Target domains to monitor, by name, such as [`~mfuser.training.monitoring.MonitoredDomain`].
        run_record (`dict`, *optional*):
            What determines the result ([`~mfuser.training.run_record.run_record`]), saved with every checkpoint.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the text encoder, saved with the model so that it can be given other classes.
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
        run_record: dict[str, Any] | None = None,
        tokenizer=None,
        **kwargs,
    ):
        encoders, self.encoders = model.encoders or encoders, None
        if args.save_trainable_only and frozen_encoders(model):
            if encoders is None:
                raise ValueError(
                    "save_trainable_only leaves out the frozen encoders, but their origin is unknown; pass "
                    "encoders={'vfm': ..., 'vlm': ...} (`mfuser train`: vfm and vlm), or set save_trainable_only to "
                    "false"
                )
            self.encoders = checked_encoders(model, encoders)
        if train_dataset is not None:
            model.config.confidence_temperature = None  # it holds for the weights before the training
        self.monitored = dict(monitored or {})
        metrics = ["mean_iou", "overall_accuracy", *(f"iou_{name}" for name in model.config.id2label.values())]
        check_selection(args.metric_for_best_model, metrics, eval_dataset, self.monitored)
        if args.parallel_mode.value == "distributed" and args.device.type != "cpu":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.train_sampler = train_sampler
        drawn = train_dataset if train_sampler is None else train_sampler
        batch = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and isinstance(drawn, Sized) and len(drawn) < batch:
            raise ValueError(
                f"a batch of all processes has {batch} samples and an epoch {len(drawn)}, so dataloader_drop_last "
                "drops them all; set it to false or lower per_device_train_batch_size"
            )
        self.run_record, self.tokenizer = run_record, tokenizer
        self.loss_is_finite: torch.Tensor | bool = True  # since the last optimizer step
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
        self.nonfinite = SkipNonFiniteSteps(self)
        self.add_callback(self.nonfinite)
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
            ValueError: If there is no validation set, or none with this name.
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
            # A function, since LambdaLR saves the attributes of other callables and restores them when a run is
            # resumed, among them the number of steps.
            rate = lambda step: schedule(step)  # noqa: E731
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Private in Trainer, which has no public hook between loading the schedule and the first step.
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"the optimizer or schedule in {checkpoint} cannot be read ({error}); resume from another checkpoint"
            ) from error
        if checkpoint is not None and not self.is_deepspeed_enabled:
            restart_schedule(getattr(self.lr_scheduler, "scheduler", self.lr_scheduler))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.loss_is_finite = torch.isfinite(loss.detach()) & self.loss_is_finite
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
            if self.nonfinite.total:
                logs["nonfinite_steps"] = self.nonfinite.total
            if skipped := self.skipped_rows():
                logs["skipped_rows"] = skipped
        super().log(logs, start_time)

    def skipped_rows(self) -> int:
        """Number of training rows that could not be read and were skipped, over all processes."""
        rows = getattr(self.train_dataset, "skipped", None)
        if rows is None or not rows.skip:
            return 0
        flags = rows.flags.to(self.args.device, torch.int32)
        return int((self.accelerator.reduce(flags, "sum") > 0).sum())

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
        dataset: Any = dataloader.dataset
        images: Any = dataset.dataset if isinstance(dataset, Subset) else dataset  # those of all processes
        skip = isinstance(images, MonitoredDomain) or getattr(images, "skip_unreadable", False)
        scores = self._score(dataloader, skip, report_progress=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        if len(images) and scores.get("unreadable") == len(images):
            raise ValueError("none of the validation images can be read; see the warnings above")
        if "mean_iou" not in scores:
            raise ValueError("no labelled pixel was counted in the validation images; scores need at least one")
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(images))

    def _score(self, dataloader: DataLoader, skip_unreadable: bool, report_progress: bool = False) -> dict[str, float]:
        """
        Mean IoU, overall accuracy and IoU per class over the images of all processes, unless no pixel is labelled.

        With `skip_unreadable`, images without scores are left out and counted as `unreadable`, as are those that the
        dataset could not read.
        """
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        metric = MeanIoU(model.config.num_labels, model.config.semantic_loss_ignore_index, device=self.args.device)
        unreadable = 0
        for position, batch in enumerate(dataloader):
            problem = batch["error"][0] if "error" in batch else None
            if problem is None:
                try:
                    self._count(batch, model, metric)
                except Exception as error:
                    if not is_expected(error) or (is_out_of_memory(error) and not skip_unreadable):
                        raise
                    problem = f"{self._title(dataloader, position)}: {one_line(error)}"
                    if not skip_unreadable:
                        raise ValueError(problem) from error
            if problem is not None:
                unreadable += 1
                logger.warning(f"{problem}; the image is left out of the score.")
            elif report_progress:
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        counted = metric.reduce(self.accelerator)
        scores = named_scores(counted.compute(), model.config.id2label) if counted.matrix.any() else {}
        count = self.accelerator.reduce(torch.tensor(unreadable, device=self.args.device), "sum").item()
        return scores | ({"unreadable": count} if count else {})

    def _count(self, batch: dict[str, torch.Tensor], model: nn.Module, metric: MeanIoU) -> None:
        batch = self._prepare_inputs(batch)
        with torch.no_grad(), self.accelerator.autocast():
            scores = model(pixel_values=batch["pixel_values"]).logits
        metric.update(preprocess_logits_for_metrics(scores, batch["labels"]), batch["labels"])

    def _title(self, dataloader: DataLoader, position: int) -> str:
        """What messages call an image of this process's share."""
        index = self.args.process_index + position * self.args.world_size
        images = getattr(dataloader.dataset, "dataset", None)
        return images.title(index) if isinstance(images, MonitoredDomain) else f"Row {index} of the evaluated images"

    def monitor(self) -> dict[str, float]:
        """Scores the monitored domains, logs and returns `monitor_<name>_mean_iou`, and leaves training unchanged."""
        logs = {}
        with training_state_preserved(self.model):
            for name, dataset in self.monitored.items():
                scores = self._score(self.get_eval_dataloader(dataset), skip_unreadable=True)
                if "mean_iou" in scores:
                    logs[f"{PREFIX}_{name}_mean_iou"] = scores["mean_iou"]
                else:
                    logger.warning(f"The monitored domain {name!r} has no score: no labelled pixel was counted.")
                if "unreadable" in scores:
                    logs[f"{PREFIX}_{name}_unreadable"] = scores["unreadable"]
        self.log(dict(logs))
        return logs

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model, the image processor and the training arguments.

        With `save_trainable_only`, frozen encoders are left out and named in `encoders.json`.
        """
        final = Path(output_dir or self.args.output_dir)
        within_checkpoint = UNFINISHED_FOLDER in final.parts  # the checkpoint is renamed when it is complete
        folder = final if within_checkpoint else final / UNFINISHED_FOLDER
        # Every process takes part in this: sharded weights are gathered.
        state_dict = self.accelerator.get_state_dict(self.model_wrapped if self.is_deepspeed_enabled else self.model)
        if self.args.should_save:
            check_finite(state_dict, self.state.global_step)
            with contextlib.nullcontext() if within_checkpoint else unfinished(folder):
                self._write_model(folder, state_dict)
                if not within_checkpoint:
                    publish_files(folder, final)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state_dict |= {name: state_dict[name].reshape(()) for name in self._scalars}
        if self.args.save_trainable_only:
            state_dict = weights_without_encoders(model, state_dict)
        model.save_pretrained(folder, state_dict=state_dict)
        if self.encoders is not None:
            write_encoders_file(folder, self.encoders)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.run_record is not None:
            write_text(folder / RECORD_FILE, json.dumps(self.run_record, indent=2) + "\n")
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        # Private in Trainer, which writes the files of a checkpoint one by one under the folder's final name. Its only
        # public hooks there are save_model, before most files are written, and on_save, after all are visible.
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        args, final = self.args, Path(self._get_output_dir(trial), name)
        staging = Path(args.output_dir, UNFINISHED_FOLDER)
        with unfinished(staging) if args.should_save else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            self.args = copy.copy(args)
            self.args.output_dir, self.args.push_to_hub = str(staging), False
            try:
                written = Path(self._get_output_dir(trial), name)
                super()._save_checkpoint(model, trial)
            finally:
                self.args = args
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
            if args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                torch.save(args, written / TRAINING_ARGS_NAME)
                publish(written, final)
        if args.should_save:
            rotate(final.parent, args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def create_model_card(self, *args, **kwargs):
        """Creates a draft of a model card, unless there is a model card already."""
        if not Path(self.args.output_dir, "README.md").exists():
            super().create_model_card(*args, **kwargs)


__all__ = ["MFuserTrainer", "MFuserTrainingArguments"]
