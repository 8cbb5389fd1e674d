"""A cache for values that depend on weights alone."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

Value = TypeVar("Value")


class WeightsCache:
    """
    Caches a value computed from weights; it is recomputed when a weight, or the autocast dtype, has changed.

    The cache is not used while gradients are recorded, while compiling, on the meta device, or with PEFT adapters,
    which can be switched off without a change of any weight. In-place changes of `weight.data`, such as
    `weight.data.mul_(2)`, are not detected: call [`~WeightsCache.clear`] afterwards.
    """

    _entry: tuple[list[weakref.ref], list | None, Any]  # weights, key, value

    def __init__(self):
        self.clear()

    def __reduce__(self):
        return type(self), ()  # copies of a model, and saved ones, start with an empty cache

    def clear(self):
        self._entry = [], None, None

    def get(self, sources: Iterable[nn.Module | torch.Tensor], compute: Callable[[], Value], *settings) -> Value:
        """
        The value of `compute()` for the current weights of `sources` and the current `settings`.

        Args:
            sources (iterable of `nn.Module` and `torch.Tensor`):
                Every module and weight that `compute` depends on.
            compute (`Callable`):
                Computes the value.
            settings:
                What else `compute` depends on; compared by equality.
        """
        weights: list[torch.Tensor] = []
        for source in sources:
            if torch.is_grad_enabled() or torch.compiler.is_compiling() or _cannot_be_tracked(source):
                return compute()
            weights += [source] if isinstance(source, torch.Tensor) else source.parameters()
        if not weights:  # as in a replica of `nn.DataParallel`
            return compute()
        device = weights[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = [autocast, *settings]
        key += [(w.data_ptr(), w.dtype, None if w.is_inference() else w._version) for w in weights]
        # One read and one write of the entry: replicas of a model on several devices share the cache.
        cached, cached_key, value = self._entry
        if key != cached_key or any(old() is not new for old, new in zip(cached, weights, strict=True)):
            value = compute()
            # References that do not keep offloaded weights in memory. That of a deleted weight equals no other weight,
            # even one that is allocated at its address.
            self._entry = [weakref.ref(weight) for weight in weights], key, value
        return value


def _cannot_be_tracked(source: nn.Module | torch.Tensor) -> bool:
    """Whether `source` has PEFT adapters, or weights on the meta device, as offloaded weights have between uses."""
    if isinstance(source, torch.Tensor):
        return source.is_meta
    adapted = any(type(module).__module__.startswith("peft.") for module in source.modules())
    return adapted or any(weight.is_meta for weight in source.parameters())
