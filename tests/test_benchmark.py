"""The benchmarks measure what they state. No test depends on execution times."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from mfuser import MFuserImageProcessor
from mfuser.quantization import int8_products_are_exact
from mfuser.scripts import benchmark, benchmark_data, cli
from mfuser.scripts import benchmark_commands as commands
from mfuser.scripts import benchmark_measuring as measuring
from mfuser.scripts import benchmark_model as models
from mfuser.scripts import benchmark_quantization as quantization
from mfuser.scripts import benchmark_scan as scans


def test_every_scan_that_is_compared_gives_the_same_sequence():
    inputs = scans.scan_inputs("cpu", batch=2, dim=8, length=33, state=4)
    expected = scans.step_loop(*inputs)
    for scan in scans.SCANS.values():
        torch.testing.assert_close(scan(*inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_candidates_run_in_turns_and_the_first_round_does_not_count():
    order = []
    candidates = {name: partial(order.append, name) for name in "ab"}
    seconds = measuring.in_turns(candidates, rounds=3, device="cpu")
    assert order == ["a", "b"] * 4 and set(seconds) == {"a", "b"}
    few, many = (measuring.in_turns({"sum": partial(sum, range(n))}, 1, "cpu", False)["sum"] for n in (10, 10**6))
    assert 0 < few < many


def test_operations_of_products_and_of_attention_are_counted():
    a = torch.randn(8, 16)
    assert measuring.count_flops(lambda: a @ a.T) == 2 * 8 * 16 * 8
    query = torch.randn(1, 2, 5, 4)
    attention = partial(torch.nn.functional.scaled_dot_product_attention, query, query, query)
    assert measuring.count_flops(attention) == 2 * 2 * 2 * 5 * 5 * 4


def test_parts_of_a_forward_add_up_to_less_than_the_whole():
    model = tiny_model()
    timer = models.PartTimer(model, "cpu")
    start = time.perf_counter()
    with torch.no_grad():
        model(tiny_batch()["pixel_values"])
    whole = time.perf_counter() - start
    assert set(timer.seconds) == set(models.part_modules(model))
    assert all(seconds > 0 for seconds in timer.seconds.values())
    assert sum(timer.seconds.values()) < whole


def test_figures_are_printed_as_a_table_and_written_with_the_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(benchmark.PARTS, "metric", lambda options: [{"metric": "ours", "ms per map": 3.14159}])
    assert benchmark.main(["metric", "--json", str(tmp_path / "figures.json")]) == 0
    assert "| ours | 3.14 |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["metric"] == [{"metric": "ours", "ms per map": 3.14159}]
    assert {"processor", "cores", "threads", "torch", "device"} <= set(figures["machine"])
    assert figures["command"][:3] == ["mfuser", "benchmark", "metric"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown part speed; the parts are scan, forward"),
        (["metric", "--rounds", "0"], "argument --rounds: '0' must be an integer of at least 1"),
        (["metric", "--threads", "two"], "argument --threads: 'two' must be an integer of at least 1"),
        (["metric", "--device", "gpu"], "argument --device: 'gpu' must be an available device"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        benchmark.main(arguments)
    assert exit_code.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_reported_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(benchmark.PARTS, "metric", lambda options: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert benchmark.main(["metric", "--json", str(tmp_path / "file" / "figures.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mfuser benchmark: ") and error.count("\n") == 1


def test_earlier_figures_remain_until_all_parts_are_measured(tmp_path, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark.PARTS, "metric", lambda options: [{"time": 1.0}])
    monkeypatch.setitem(benchmark.PARTS, "scan", interrupted)
    file = tmp_path / "figures.json"
    file.write_text("earlier")
    assert benchmark.main(["metric", "scan", "--json", str(file)]) == 130
    assert file.read_text() == "earlier"
    assert json.loads((tmp_path / "figures.partial.json").read_text())["metric"] == [{"time": 1.0}]
    assert benchmark.main(["metric", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["metric"] and list(tmp_path.iterdir()) == [file]


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "mfuser.scripts.benchmark_data", raising=False)
    assert benchmark.main(["metric"]) == 2
    assert 'needs the package evaluate: pip install "mfuser[train]"' in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_fails_ends_the_command_with_its_message(capsys, monkeypatch):
    failing = partial(measuring.in_own_process, scans.scan_peak_mebibytes, "no scan", False, "cpu")
    monkeypatch.setitem(benchmark.PARTS, "scan", lambda options: failing())
    assert cli.main(["benchmark", "scan"]) == 2
    assert "scan_peak_mebibytes failed in its process with exit code 1: KeyError: 'no scan'" in capsys.readouterr().err


def test_every_quantised_layer_that_is_compared_computes_the_same_layer():
    torch.manual_seed(0)
    linear, states = torch.nn.Linear(64, 32).requires_grad_(False), torch.randn(40, 64)
    engine = torch.backends.quantized.engine
    for name, build in quantization.LINEAR_LAYERS.items():
        if name.startswith("torchao"):
            pytest.importorskip("torchao")
        if name == "int8-dynamic" and not int8_products_are_exact():
            continue  # `quantize` refuses it on such a CPU
        given = states.bfloat16() if name == "bfloat16 throughout" else states
        error = quantization.relative_error(build(linear)(given), linear(states))
        assert error < 0.03 and (error > 0) == (name != "float32"), name
    torch.backends.quantized.engine = engine


def test_every_part_is_described_and_measured_by_a_function():
    for name, part in benchmark.PARTS.items():
        module, function = part.args
        assert callable(getattr(importlib.import_module(f"mfuser.scripts.benchmark_{module}"), function))
        assert re.search(rf"^  {name} ", benchmark.DESCRIPTION, re.MULTILINE), name


@pytest.mark.slow
def test_without_a_gpu_the_report_says_what_it_would_do(tmp_path):
    script = Path(benchmark.__file__).parent / "gpu_report.sh"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", script, tmp_path / "report"], env=environment, capture_output=True, text=True, check=True
    )
    commands = re.findall(r"at most (\d+) s\): .* -m (.*)", done.stdout)
    assert sum(int(seconds) for seconds, _ in commands) <= 8 * 60
    assert not (tmp_path / "report").exists()
    for _, command in commands:
        module, *arguments = command.split()
        if module == "pytest":
            assert all((script.parent.parent / argument).exists() for argument in arguments if argument[0] != "-")
        else:
            assert arguments[arguments.index("--device") + 1] == "cuda"
            assert benchmark.parse_arguments([argument.replace("cuda", "cpu") for argument in arguments]).parts


def test_postprocessing_gives_the_labels_it_is_compared_with():
    scores = torch.randn(5, 40, 60)
    expected, found = (function(scores, (80, 120)) for function in benchmark_data.POSTPROCESSING.values())
    assert torch.equal(expected, found.long())


@pytest.mark.slow
@pytest.mark.skipif(not int8_products_are_exact(), reason="int8-dynamic is refused on this CPU")
def test_quantised_models_are_compared_with_float32(monkeypatch):
    monkeypatch.setattr(quantization, "inference_model", lambda *_: tiny_model())
    monkeypatch.setattr(quantization, "gemm", lambda *_: (lambda: None, 1.0))
    rows = quantization.benchmark_quantized(benchmark.parse_arguments(["quantized", "--crop", "64", "--rounds", "1"]))
    assert [row["model"] for row in rows] == ["float32", "bfloat16", "int8-weight-only", "int8-dynamic"]
    errors = [row["error of the scores, %"] for row in rows]
    assert errors[0] == 0 and all(0 < error < 5 for error in errors[1:])
    assert rows[0]["time / time of float32"] == 1 and rows[0]["same labels, %"] == 100


@pytest.mark.slow
def test_evaluation_is_measured_step_by_step_and_overlapped():
    options = benchmark.parse_arguments(["evaluation", "--rounds", "1"])
    model = tiny_model()
    rows = commands.evaluation_rows(model, MFuserImageProcessor(), images=2, size=(64, 48), options=options)
    sequential, overlapped = rows
    shares = [value for name, value in sequential.items() if name.endswith("%")]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100)
    assert overlapped["speedup"] == pytest.approx(overlapped["images/s"] / sequential["images/s"])
