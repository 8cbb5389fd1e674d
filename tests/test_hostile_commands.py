"""Errors of commands: one line that names what is wrong and exit code 2; bugs keep their traceback."""

import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError

from mfuser.scripts import cli

# --- the common way errors are reported ------------------------------------------------------------------------------

EXPECTED = [
    (ValueError("lr is -1;\n  it must be positive"), "mfuser test: lr is -1; it must be positive"),
    (OSError(28, "No space left on device", "weights"), "mfuser test: [Errno 28] No space left on device: 'weights'"),
    (SafetensorError("header too large"), "mfuser test: header too large"),
    (yaml.YAMLError("found a tab"), "mfuser test: found a tab"),
    (StrictDataclassFieldValidationError("depth", TypeError("not an int")), "mfuser test: Validation error for"),
    (torch.OutOfMemoryError("CUDA out of memory"), "mfuser test: CUDA out of memory"),
    (MemoryError(), "mfuser test: out of memory"),
    (ImportError("pip install datasets"), "mfuser test: pip install datasets"),
    (cli.CommandError("another run is writing"), "mfuser test: another run is writing"),
    (ValueError(), "mfuser test: ValueError"),
]


def command_that_raises(error: BaseException):
    @cli.reports_errors("test")
    def main(arguments):
        assert "--debug" not in arguments
        raise error

    return main


@pytest.mark.parametrize(("error", "line"), EXPECTED, ids=lambda value: type(value).__name__)
def test_an_error_that_input_can_cause_is_one_line_and_exit_code_2(error, line, capsys):
    assert command_that_raises(error)([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(line) and len(printed.err.splitlines()) == 1


def test_debug_shows_the_traceback_above_the_same_line(capsys):
    assert command_that_raises(ValueError("wrong"))(["a", "--debug", "b"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.endswith("\nmfuser test: wrong\n")


@pytest.mark.parametrize("bug", [RuntimeError("bug"), TypeError("bug"), KeyError("bug"), AssertionError("bug")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        command_that_raises(bug)([])


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    assert command_that_raises(KeyboardInterrupt())([]) == 130
    assert capsys.readouterr().err == "mfuser test: interrupted\n"


def test_debug_may_precede_the_command(capsys, tmp_path):
    arguments = ["convert", str(tmp_path / "missing.pth"), "--output", str(tmp_path / "out")]
    for place in (["--debug", *arguments], [*arguments, "--debug"]):
        with pytest.raises(SystemExit) as exit_code:
            cli.main(place)
        assert exit_code.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("mfuser convert: error: ")
    assert cli.main(["--debug"]) == 0 and "shows the traceback" in capsys.readouterr().out


def test_the_list_of_commands_loads_no_library():
    code = "import sys; from mfuser.scripts import cli; cli.main(['--help']); print([*sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" not in printed and "'transformers'" not in printed
