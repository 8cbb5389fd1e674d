"""The training arguments: Transformers' and those of the published recipe, with the checks of their ranges."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

# Optimizers of which Transformers ignores `optim_args`, and schedules of which it ignores `lr_scheduler_kwargs`.
WITHOUT_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor")
WITHOUT_SCHEDULER_KWARGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
# Schedules that follow a metric rather than the number of steps.
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# Settings for language models, and their values without effect.
FOR_LANGUAGE_MODELS = {
    "include_num_input_tokens_seen": "no",
    "liger_kernel_config": None,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
}


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
            Whether checkpoints and the final model leave out frozen encoders.
        monitor_steps (`int`, *optional*, defaults to 500):
            Number of steps between evaluations of the monitored domains, independent of `eval_steps`. They are also
            evaluated after the last step.
        max_nonfinite_steps (`int`, *optional*, defaults to 10):
            Number of consecutive steps with a loss or gradients that are not finite after which training stops. Such
            steps change no weights.
    """

    lr_scheduler_type: SchedulerType | str = field(
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
        metadata={
            "help": "Number of steps between evaluations of the monitored domains, independent of eval_steps. They "
            "are also evaluated after the last step."
        },
    )

    max_nonfinite_steps: int = field(
        default=10,
        metadata={
            "help": "Number of consecutive steps with a loss or gradients that are not finite after which training "
            "stops. Such steps change no weights."
        },
    )

    def __post_init__(self):
        batches = ("per_device_train_batch_size", "per_device_eval_batch_size")
        for name in (*batches, "gradient_accumulation_steps", "monitor_steps", "max_nonfinite_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_train_epochs", "learning_rate", "schedule_power", "save_steps", "eval_steps"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "min_learning_rate", "dataloader_num_workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps is {self.max_steps}; it must be at least 1, or -1 for num_train_epochs")
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"warmup_start is {self.warmup_start}; it must be between 0 and 1")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and {(1 << 32) - 1}")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(
                f"save_total_limit is {self.save_total_limit}; it must be at least 1, or null to keep all checkpoints"
            )
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; it must be 0, since the mask loss does not "
                "support label smoothing"
            )
        if self.optim_args and self.optim in WITHOUT_OPTIM_ARGS:
            raise ValueError(f"optim_args is {self.optim_args!r}, which has no effect with optim {self.optim}")
        super().__post_init__()
        for name, unset in FOR_LANGUAGE_MODELS.items():
            if getattr(self, name) != unset:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is for language models and must be {unset}")
        if self.lr_scheduler_kwargs:
            self._check_scheduler_kwargs()
        if self.lr_scheduler_type == "polynomial" and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}; it must be at most learning_rate "
                f"({self.learning_rate})"
            )

    def _check_scheduler_kwargs(self) -> None:
        kind, given = SchedulerType(self.lr_scheduler_type), f"lr_scheduler_kwargs is {self.lr_scheduler_kwargs}"
        if kind == SchedulerType.POLYNOMIAL:
            raise ValueError(
                f"{given}, which has no effect with lr_scheduler_type polynomial; use schedule_power, "
                "min_learning_rate and warmup_start"
            )
        if kind in WITHOUT_SCHEDULER_KWARGS:
            raise ValueError(f"{given}, which has no effect with lr_scheduler_type {kind.value}")
        optimizer = torch.optim.SGD([torch.zeros(1)])
        try:  # some values are used first in a later step
            scheduler = get_scheduler(kind, optimizer, 1, 4, self.lr_scheduler_kwargs)
            for _ in range(4 if kind.value not in BY_METRIC else 0):
                optimizer.step()
                scheduler.step()
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"{given}, which does not fit lr_scheduler_type {kind.value}: {error}") from error


__all__ = ["MFuserTrainingArguments"]
