"""The benchmark measures what it states. No test depends on how fast anything is."""

import json
import time
from functools import partial

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from mfuser.scripts import benchmark


def test_every_scan_that_is_compared_gives_the_same_sequence():
    inputs = benchmark.scan_inputs("cpu", batch=2, dim=8, length=33, state=4)
    expected = benchmark.step_loop(*inputs)
    for scan in benchmark.SCANS.values():
        torch.testing.assert_close(scan(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_candidates_run_in_turns_and_the_first_round_does_not_count():
    order = []
    candidates = {name: partial(order.append, name) for name in "ab"}
    seconds = benchmark.in_turns(candidates, rounds=3, device="cpu")
    assert order == ["a", "b"] * 4 and set(seconds) == {"a", "b"}
    few, many = (benchmark.in_turns({"sum": partial(sum, range(n))}, 3, "cpu")["sum"] for n in (10, 10**6))
    assert 0 < few < many


def test_operations_of_products_and_of_attention_are_counted():
    a = torch.randn(8, 16)
    assert benchmark.count_flops(lambda: a @ a.T) == 2 * 8 * 16 * 8
    query = torch.randn(1, 2, 5, 4)
    attention = partial(torch.nn.functional.scaled_dot_product_attention, query, query, query)
    assert benchmark.count_flops(attention) == 2 * 2 * 2 * 5 * 5 * 4


def test_parts_of_a_forward_add_up_to_less_than_the_whole():
    model = tiny_model()
    timer = benchmark.PartTimer(model, "cpu")
    start = time.perf_counter()
    with torch.no_grad():
        model(tiny_batch()["pixel_values"])
    whole = time.perf_counter() - start
    assert set(timer.seconds) == set(benchmark.part_modules(model))
    assert all(seconds > 0 for seconds in timer.seconds.values())
    assert sum(timer.seconds.values()) < whole


def test_figures_are_printed_as_a_table_and_written_with_the_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(benchmark.PARTS, "metric", lambda options: [{"metric": "ours", "ms a map": 3.14159}])
    assert benchmark.main(["metric", "--json", str(tmp_path / "figures.json")]) == 0
    assert "| ours | 3.14 |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["metric"] == [{"metric": "ours", "ms a map": 3.14159}]
    assert {"processor", "cores", "threads", "torch", "device"} <= set(figures["machine"])
    assert figures["command"][:3] == ["mfuser", "benchmark", "metric"]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["speed"])
    assert "no part speed; there are scan, forward" in capsys.readouterr().err
