"""Steps with non-finite loss or gradients: skipped, counted, and an error if there are many in a row."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging

from mfuser.pretrained_mfuser import nonfinite_tensors

logger = logging.get_logger("transformers.mfuser.training")


class NotFiniteError(ValueError):
    """Loss, gradients or weights are NaN or infinite."""


class SkipNonFiniteSteps(TrainerCallback):
    """
    Discards the gradients of steps that are not finite, so that they change no weights.

    Under a gradient scaler (fp16) and under DeepSpeed, which skip such steps themselves, only the loss is checked.

    Args:
        trainer ([`~mfuser.training.trainer.MFuserTrainer`]):
            The trainer.

    Attributes:
        total (`int`):
            Number of skipped steps.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.total = self.consecutive = 0
        self.statistics: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Keeps the statistics of BatchNorm, which the forward pass of a step changes."""
        self.statistics = [(buffer, buffer.clone()) for buffer in batch_statistics(self.trainer.model)]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Discards gradients if they or the loss are not finite; raises `NotFiniteError` after many in a row."""
        finite = self._is_finite()
        self.trainer.loss_is_finite = True
        if finite:
            self.consecutive = 0
            return
        self.total += 1
        self.consecutive += 1
        step = state.global_step + 1
        if self.consecutive >= args.max_nonfinite_steps:
            raise NotFiniteError(
                f"the loss or the gradients of {self.consecutive} steps in a row, up to step {step}, are not finite, "
                "and training stops; these steps changed no weights, and the last checkpoint is complete. A lower "
                "learning_rate or a max_grad_norm may help"
            )
        logger.warning(f"The loss or the gradients of step {step} are not finite; it changes no weights.")
        for buffer, before in self.statistics:
            buffer.copy_(before)
        if self.trainer.accelerator.scaler is None:
            self.trainer.model.zero_grad(set_to_none=True)

    def _is_finite(self) -> bool:
        accelerator, loss = self.trainer.accelerator, self.trainer.loss_is_finite
        finite = torch.as_tensor(loss, device=accelerator.device)
        gradients = [weight.grad for weight in self.trainer.model.parameters() if weight.grad is not None]
        if gradients and accelerator.scaler is None:
            # The largest absolute value cannot overflow, as a Euclidean norm can.
            largest = get_total_norm(gradients, norm_type=float("inf"))
            finite = finite & torch.isfinite(largest.full_tensor() if isinstance(largest, DTensor) else largest)
        if accelerator.num_processes > 1:  # all processes must make the same decision
            finite = accelerator.reduce(finite.to(torch.float32), "sum") == accelerator.num_processes
        return bool(finite)


def batch_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The running statistics of every BatchNorm of a model."""
    layers = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    return [buffer for layer in layers for buffer in layer.buffers()]


def check_finite(state_dict: dict[str, torch.Tensor], step: int) -> None:
    """Raises `NotFiniteError` if a tensor that is to be saved holds NaN or infinite values."""
    if bad := nonfinite_tensors(state_dict):
        raise NotFiniteError(
            f"{len(bad)} of the model's tensors, such as {bad[0]}, are not finite after step {step}; they are not "
            "saved. The last checkpoint is complete; a lower learning_rate or max_grad_norm may help"
        )


__all__ = ["NotFiniteError", "SkipNonFiniteSteps", "check_finite"]
