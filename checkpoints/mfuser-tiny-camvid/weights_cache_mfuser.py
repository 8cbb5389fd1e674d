"""A cache for values that depend on weights alone."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


class WeightsCache:
    """
    Caches a value computed from weights; it is recomputed when a weight, or the autocast dtype, has changed.

    The cache is not used while gradients are recorded, while compiling or on the meta device. Changes in place of
    `weight.data`, such as `weight.data.mul_(2)`, go unnoticed: call [`~WeightsCache.clear`] afterwards.
    """

    _entry: tuple[list[torch.Tensor], list | None, Any]  # weights, key, value

    def __init__(self):
        self.clear()

    def clear(self):
        self._entry = [], None, None

    def get(self, weights: Iterable[torch.Tensor], compute: Callable[[], Value], *settings) -> Value:
        """
        The value of `compute()` for the current `weights` and `settings`.

        Args:
            weights (iterable of `torch.Tensor`): Every weight that `compute` depends on.
            compute (`Callable`): Computes the value.
            settings: What else `compute` depends on; compared by equality.
        """
        weights = list(weights)
        device = weights[0].device.type
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or device == "meta":
            return compute()
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = [autocast, *settings]
        key += [(w.data_ptr(), w.dtype, None if w.is_inference() else w._version) for w in weights]
        # One read and one write of the entry: replicas of a model on several devices share the cache.
        cached, cached_key, value = self._entry
        if len(weights) != len(cached) or any(map(operator.is_not, weights, cached)) or key != cached_key:
            value = compute()
            # The weights are referenced, so that no new tensor can be allocated at the address of a deleted one.
            self._entry = weights, key, value
        return value
