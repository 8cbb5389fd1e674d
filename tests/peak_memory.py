"""Peak memory of `mfuser segment` in a separate process, which segments two images or frames at a time."""

import os
import subprocess
import sys

# Not `ru_maxrss`, which starts from the memory of the process that this one was forked from.
SEGMENT = """
import re, sys
from pathlib import Path
from mfuser.scripts import cli
code = cli.main(["segment", *sys.argv[1:], "--device", "cpu"])
print(code, int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def segment_peak_mebibytes(*arguments: object) -> int:
    command = [sys.executable, "-c", SEGMENT, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    code, peak = map(int, printed.splitlines()[-1].split())
    assert code == 0, printed
    return peak
