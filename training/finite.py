"""Steps whose loss or gradients are not finite: skipped, counted, and an error if there are many in a row."""

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger("transformers.mfuser.training")


class SkipNonFiniteSteps(TrainerCallback):
    """
    Discards the gradients of steps that are not finite, so that they change no weights.

    Under a gradient scaler (fp16) and under DeepSpeed, which skip such steps themselves, only the loss is checked.

    Args:
        trainer ([`~mfuser.training.trainer.MFuserTrainer`]):
            The trainer.

    Attributes:
        total (`int`): Number of skipped steps.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.total = self.consecutive = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Discards gradients if they or the loss are not finite; raises `FloatingPointError` after many in a row."""
        finite = self._is_finite()
        self.trainer.loss_is_finite = True
        if finite:
            self.consecutive = 0
            return
        self.total += 1
        self.consecutive += 1
        step = state.global_step + 1
        if self.consecutive >= args.max_nonfinite_steps:
            raise FloatingPointError(
                f"the loss or the gradients of {self.consecutive} steps in a row, up to step {step}, are not finite, "
                "and training stops; these steps changed no weights, and the last checkpoint is whole. A lower "
                "learning_rate or a max_grad_norm may help"
            )
        logger.warning(f"The loss or the gradients of step {step} are not finite; it changes no weights.")
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
        if accelerator.num_processes > 1:  # all processes must decide alike
            finite = accelerator.reduce(finite.to(torch.float32), "sum") == accelerator.num_processes
        return bool(finite)


__all__ = ["SkipNonFiniteSteps"]
