"""Steps of a command that run at the same time, in threads, with results in order and a bounded number in between."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """
    Calls `function` on every item in threads, and yields the results in the order of the items.

    An exception of `function` is raised in the place of its result.

    Args:
        function (`Callable`):
            Called on each item; with one thread, in the order of the items.
        items (`Iterable`):
            The items. The calling thread iterates over them.
        threads (`int`):
            Number of threads.
        ahead (`int`):
            Number of items that are taken before the first result is yielded, beside the one awaited.
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


def read_ahead(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """
    Iterates over `items` in another thread.

    Args:
        items (`Iterable`):
            The items.
        ahead (`int`):
            Number of items that are read before they are asked for.
    """
    iterator, end = iter(items), object()

    def read(_: None) -> Any:
        return next(iterator, end)

    for item in in_order(read, repeat(None), threads=1, ahead=ahead):
        if item is end:
            return
        yield item
