"""The optimizer groups and the learning-rate schedule of the published recipe."""

from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)
# The published code exempts parameters with "norm" in their name. These have other names there, so it decays them.
OTHER_NORMS = (nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm)
DECAYED_LAYER_NORMS = tuple(
    f".enhancer.{name}" for name in ("visual_in_norm", "visual_out_norm", "text_norm", "out_norm")
)
LEVEL_AND_QUERY_EMBEDDINGS = (".decoder.level_embedding", ".decoder.query_position_embedding")


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_embeddings: bool = True, decay_norms: bool = True
) -> list[dict]:
    """
    Splits the trainable parameters into two groups for AdamW: with and without weight decay.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, possibly in a wrapper.
        weight_decay (`float`):
            Weight decay of the first group. Layer normalisation has none.
        decay_embeddings (`bool`, *optional*, defaults to `True`):
            Whether weight decay acts on the decoder's level and query embeddings.
        decay_norms (`bool`, *optional*, defaults to `True`):
            Whether weight decay acts on BatchNorm, GroupNorm and four LayerNorms of the MTEnhancer, as in the
            published code (probably by accident). `False` exempts every normalisation layer.

    Returns:
        `list[dict]`: Two dictionaries of `params` and `weight_decay`. Each trainable parameter is in exactly one.

    Raises:
        ValueError: If no parameter is trainable.
    """
    exempt = set()
    for name, module in model.named_modules():
        decayed_norm = isinstance(module, OTHER_NORMS) or f".{name}".endswith(DECAYED_LAYER_NORMS)
        if isinstance(module, LAYER_NORMS + OTHER_NORMS) and not (decayed_norm and decay_norms):
            exempt |= {id(weight) for weight in module.parameters()}
    if not decay_embeddings:
        exempt |= {
            id(weight) for name, weight in model.named_parameters() if f".{name}".endswith(LEVEL_AND_QUERY_EMBEDDINGS)
        }
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameter; at least one must have requires_grad=True")
    return [
        {"params": [weight for weight in trainable if id(weight) not in exempt], "weight_decay": weight_decay},
        {"params": [weight for weight in trainable if id(weight) in exempt], "weight_decay": 0.0},
    ]


class PolynomialSchedule:
    """
    Learning rate at a step, relative to the base rate: mmcv's `poly` policy with linear warm-up.

    The polynomial starts at step 0, during the warm-up; Transformers' polynomial schedule starts after the warm-up.

    Args:
        base (`float`):
            Learning rate at the start of the polynomial.
        minimum (`float`):
            Learning rate at the end of the training.
        steps (`int`):
            Number of training steps.
        warmup_steps (`int`, *optional*, defaults to 0):
            Number of steps in which a factor rises linearly from `warmup_start` to 1. It multiplies the polynomial.
        power (`float`, *optional*, defaults to 0.9):
            Power of the polynomial.
        warmup_start (`float`, *optional*, defaults to 1e-6):
            Factor at step 0.
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
            raise ValueError(
                f"the learning rate is {base} and its minimum {minimum}; the minimum must be between 0 and the "
                "learning rate, which must be positive"
            )
        self.base, self.minimum, self.steps = base, minimum, steps
        self.warmup_steps, self.power, self.warmup_start = warmup_steps, power, warmup_start

    def __call__(self, step: int) -> float:
        remaining = max(0.0, 1 - step / self.steps)
        rate = (self.base - self.minimum) * remaining**self.power + self.minimum
        if step < self.warmup_steps:
            rate *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_start)
        return rate / self.base


def restart_schedule(scheduler: LRScheduler) -> None:
    """
    Sets the learning rates to those that the schedule has at its current step.

    A checkpoint holds the rates of the schedule that it was saved with. If a run is resumed with another length, its
    next step would have the rate of the earlier length.

    Args:
        scheduler (`LRScheduler`):
            A schedule whose state was loaded. Others than `LambdaLR` do not depend on the length and are not changed.
    """
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch -= 1
        scheduler.step()


__all__ = ["PolynomialSchedule", "parameter_groups", "restart_schedule"]
