"""Steps of a command that run concurrently, in threads, with ordered results and a bounded number of pending items."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# The operations of a model with fewer parameters are too short for several cores; such a model runs in several
# threads, each on its own cores.
SMALL_MODEL = 50_000_000
SMALL_MODEL_TOKENS_PER_BATCH = 2304  # windows of a small model, in tokens, that keep one core busy in a forward pass
MAX_MODEL_THREADS = 8


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """
    Calls `function` on every item in threads, and yields the results in the order of the items.

    An exception of `function` is raised when its result is due.

    Args:
        function (`Callable`):
            Called on each item; with one thread, in the order of the items.
        items (`Iterable`):
            The items. The calling thread iterates over them.
        threads (`int`):
            Number of threads.
        ahead (`int`):
            At most this number of items are taken in addition to the one whose result is awaited.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            while pending and (len(pending) > ahead or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(items: Iterable[Item], ahead: int) -> Generator[Item, None, None]:
    """
    Iterates over `items` in another thread.

    Args:
        items (`Iterable`):
            The items.
        ahead (`int`):
            Number of items that are read in advance.
    """
    iterator, end = iter(items), object()

    def read(_: None) -> Any:
        return next(iterator, end)

    for item in in_order(read, repeat(None), threads=1, ahead=ahead):
        if item is end:
            return
        yield item


def is_small(model: Any) -> bool:
    """Whether several threads should run the model, each with one image: a small model on a CPU."""
    return model.device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL


@contextmanager
def model_threads(model: Any) -> Iterator[int]:
    """
    The number of threads that should run a model, each with one image: 1 unless it [`is_small`]. Within the block,
    PyTorch's threads are divided among them.

    On a CPU, the operations of a small model are too small to be spread over several cores. One core per image keeps
    all of them busy. A large model, or one on a GPU, segments one image after the other.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model. Within the block, its `config.windows_per_batch` suits one core, unless it is set.
    """
    config, windows, cores = model.config, model.config.windows_per_batch, torch.get_num_threads()
    small = is_small(model)
    threads = min(cores, MAX_MODEL_THREADS) if small else 1
    if small and windows is None:
        config.windows_per_batch = max(1, SMALL_MODEL_TOKENS_PER_BATCH * config.patch_size**2 // config.crop_size**2)
    torch.set_num_threads(cores // threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(cores)
        config.windows_per_batch = windows
