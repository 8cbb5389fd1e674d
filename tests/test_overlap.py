"""Concurrent steps give the results of sequential steps, in bounded memory."""

import threading
import time

import pytest

from mfuser.overlap import in_order, read_ahead


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_items(threads):
    def later_items_are_faster(number: int) -> int:
        time.sleep(0.002 * (20 - number))
        return number**2

    assert list(in_order(later_items_are_faster, range(20), threads, ahead=4)) == [n**2 for n in range(20)]


def test_no_more_items_are_taken_than_are_ahead():
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    for number in in_order(lambda item: item, items(), threads=2, ahead=3):
        assert len(taken) <= number + 1 + 3 + 1
    taken.clear()
    for number in read_ahead(items(), 3):
        time.sleep(0.001)
        assert len(taken) <= number + 1 + 3 + 1
    assert taken == list(range(50))


def test_steps_run_concurrently():
    both = threading.Barrier(2, timeout=10)  # breaks unless two threads wait for it

    def step(item: int) -> int:
        both.wait()
        return item

    assert list(in_order(step, range(4), threads=2, ahead=2)) == [0, 1, 2, 3]
    reached = in_order(step, range(2), threads=1, ahead=1)
    waiting = threading.Thread(target=both.wait)
    waiting.start()
    assert next(reached) == 0
    both.reset()
    reached.close()
    waiting.join()


def test_an_exception_comes_in_the_place_of_its_result_and_ends_the_threads():
    def fail(number: int) -> int:
        if number == 3:
            raise KeyError(number)
        return number

    before, seen = threading.active_count(), []
    with pytest.raises(KeyError):
        for number in in_order(fail, range(10), threads=2, ahead=4):
            seen.append(number)  # noqa: PERF402
    assert seen == [0, 1, 2] and threading.active_count() == before

    def broken():
        yield 1
        raise OSError("broken")

    items = read_ahead(broken(), 2)
    assert next(items) == 1
    with pytest.raises(OSError, match="broken"):
        next(items)
    assert threading.active_count() == before
