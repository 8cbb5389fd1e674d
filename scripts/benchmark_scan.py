"""Time and memory of the selective scan."""

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from mfuser.scripts.benchmark_measuring import copy, forget_peak, in_own_process, in_turns, status_kibibytes
from mfuser.selective_scan import mamba_ssm_scan, selective_scan

SCAN_SHAPE = {"batch": 1, "dim": 512, "length": 2050, "state": 16}  # an MVFuser of the full-size CLIP variant


def step_loop(u, delta, A, B, C, D, delta_bias):
    """mamba_ssm's reference formulation: all coefficients first, then one small step per token."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, outputs = torch.zeros_like(decay[:, :, 0]), []
    # taken apart by unbind: indexing [:, :, t], as the original does, makes backward quadratic in the length
    for factor, step, row in zip(decay.unbind(2), drive.unbind(2), C.unbind(2), strict=True):
        state = factor * state + step
        outputs.append(torch.einsum("bdn,bn->bd", state, row))
    return torch.stack(outputs, dim=-1) + u * D[:, None]


def ours(u, delta, A, B, C, D, delta_bias):
    return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


def mamba_ssm(u, delta, A, B, C, D, delta_bias):
    return mamba_ssm_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


SCANS = {"step loop": step_loop, "ours": ours}
if mamba_ssm_scan is not None:
    SCANS["mamba_ssm"] = mamba_ssm


def scan_inputs(device: str, batch: int, dim: int, length: int, state: int) -> list[torch.Tensor]:
    """u, delta, A, B, C, D and delta_bias as a trained block has them."""
    torch.manual_seed(0)
    bias = torch.exp(torch.rand(dim) * 4.6 - 6.9)
    tensors = [
        F.silu(torch.randn(batch, dim, length)),
        0.7 * torch.randn(batch, dim, length),
        -torch.arange(1.0, state + 1).repeat(dim, 1),
        torch.randn(batch, state, length),
        torch.randn(batch, state, length),
        torch.ones(dim),
        bias + torch.log(-torch.expm1(-bias)),
    ]
    return [tensor.to(device) for tensor in tensors]


def run_scan(name: str, inputs: list[torch.Tensor], backward: bool):
    with torch.set_grad_enabled(backward):
        y = SCANS[name](*(tensor.detach().requires_grad_(backward) for tensor in inputs))
        if backward:
            y.sum().backward()


def scan_peak_mebibytes(name: str, backward: bool, device: str) -> float:
    """Memory that one call takes beyond its inputs, measured in a separate process."""
    inputs = scan_inputs(device, **SCAN_SHAPE)
    run_scan(name, scan_inputs(device, **(SCAN_SHAPE | {"length": 40})), backward)
    forget_peak(device)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        run_scan(name, inputs, backward)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = status_kibibytes("VmRSS")
    run_scan(name, inputs, backward)
    return (status_kibibytes("VmHWM") - before) / 1024


def scan_bytes(inputs: list[torch.Tensor], backward: bool) -> int:
    """Bytes that a pass has to read and write: inputs and output, and in backward all of them and their gradients."""
    given, output = sum(tensor.nbytes for tensor in inputs), inputs[0].nbytes
    return given + output + (2 * given + output if backward else 0)


def benchmark_scan(options) -> list[dict]:
    rows: list[dict[str, Any]] = []
    run_copy, copied = copy(options.device)  # not in turns with the scans, whose inputs it would drop from the caches
    bandwidth = copied / in_turns({"copy": run_copy}, options.rounds, options.device)["copy"]
    for length in (514, SCAN_SHAPE["length"], 8194):  # the tokens of crops of 256, 512 and 1024
        inputs = scan_inputs(options.device, **(SCAN_SHAPE | {"length": length}))
        names = list(SCANS) if length == SCAN_SHAPE["length"] else [name for name in SCANS if name != "step loop"]
        for backward in (False, True):
            candidates = {name: partial(run_scan, name, inputs, backward) for name in names}
            for name, seconds in in_turns(candidates, options.rounds, options.device).items():
                row = {"scan": name, "tokens": length, "pass": "forward + backward" if backward else "forward"}
                row["ms"] = seconds * 1e3
                moved = scan_bytes(inputs, backward) / seconds
                row |= {"GB/s of inputs and outputs": moved / 1e9, "of a copy's bandwidth": moved / bandwidth}
                if length == SCAN_SHAPE["length"]:
                    arguments = (name, backward, options.device)
                    row["peak MiB"] = in_own_process(scan_peak_mebibytes, *arguments, keep_freed=False)
                rows.append(row)
    loops = {row["pass"]: row["ms"] for row in rows if row["scan"] == "step loop"}
    for row in rows:
        if row["tokens"] == SCAN_SHAPE["length"]:
            row["speedup over the step loop"] = loops[row["pass"]] / row["ms"]
    return rows
