"""The selective scan for CPUs as machine code that numba makes: no compiler needed, no memory but that of the results.

A block of channels goes through the whole sequence with its states in the first-level cache. Backward walks through
the sequence in chunks, from the right, and computes the states of a chunk again from the kept one that enters it. All
arithmetic is float32, and sums have a fixed order for a given number of threads.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

try:
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("The selective scan as machine code for CPUs needs the package `numba`.") from error

__all__ = ["NUMBA_CHUNK_TOKENS", "numba_scan", "numba_scan_backward"]

NUMBA_CHUNK_TOKENS = _TOKENS = 32
_LANES = 64  # channels in a block
_F = np.float32
_LN_2, _LOG2_E = _F(math.log(2)), _F(1 / math.log(2))
_ROUND = _F(1.5 * 2**23)  # a small number plus this has its nearest integer in the low bits
# 2^f on [-1/2, 1/2] within 1.1e-7. Value and slope at 0 are exact: errors of decays near 1 would add up over tokens.
_EXP2 = tuple(map(_F, (1.0, math.log(2), 0.2402228160, 0.0555055999, 0.0096697089, 0.0013300265)))
_ATANH = tuple(_F(1 / k) for k in (1, 3, 5, 7, 9, 11, 13, 15))


@intrinsic
def _bits_of(context, x):
    def cast(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), cast


@intrinsic
def _from_bits(context, x):
    def cast(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), cast


# Loops over lanes become vector instructions only where a division by zero gives infinity and no exception. Sums may
# be taken in another order in `_dot` alone: `_exp2` lives on the order.
_inline = njit(inline="always", error_model="numpy", fastmath={"contract"})


@_inline
def _exp2(x):
    x = _F(-126) if x < _F(-126) else x  # not max(): NaN stays NaN
    x = _F(128) if x > _F(128) else x
    rounded = x + _ROUND
    f = (_ROUND - rounded) + x
    power = _EXP2[0] + f * (_EXP2[1] + f * (_EXP2[2] + f * (_EXP2[3] + f * (_EXP2[4] + f * _EXP2[5]))))
    return _from_bits(np.int32(_bits_of(power) + np.int32(_bits_of(rounded) << np.int32(23))))


@_inline
def _softplus(x):
    """max(x, 0) + log(1 + exp(-|x|)), the logarithm as a series of atanh: tiny results are as exact as others."""
    tail = _exp2(-abs(x) * _LOG2_E)
    r = tail / (_F(2) + tail)
    q = r * r
    series = _ATANH[4] + q * (_ATANH[5] + q * (_ATANH[6] + q * _ATANH[7]))
    series = _ATANH[0] + q * (_ATANH[1] + q * (_ATANH[2] + q * (_ATANH[3] + q * series)))
    return max(x, _F(0)) + _F(2) * r * series


@_inline
def _sigmoid(x):
    tail = _exp2(-abs(x) * _LOG2_E)
    return (_F(1) if x >= 0 else tail) / (_F(1) + tail)


@njit(fastmath={"contract", "reassoc"})
def _dot(a, b):
    total = _F(0)
    for i in range(_LANES):
        total += a[i] * b[i]
    return total


# ------------------------------------------------------------------------------------------------ kernels
# Tiles are (token of the chunk, lane) or (row, lane); lanes beyond the last channel hold zeros. `per_channel` has a
# row for each state's rate (A log2(e), for powers of 2), then D and the bias of the steps.
@_inline
def _load_tokens(x, b, start, count, channel, lanes, tile):
    for t in range(count):
        for i in range(lanes):
            tile[t, i] = x[b, start + t, channel + i]
        for i in range(lanes, _LANES):
            tile[t, i] = 0


@_inline
def _store_tokens(tile, count, lanes, x, b, start, channel):
    for t in range(count):
        for i in range(lanes):
            x[b, start + t, channel + i] = tile[t, i]


@_inline
def _load_rows(rows, channel, lanes, tile):
    for n in range(len(tile)):
        for i in range(lanes):
            tile[n, i] = rows[n, channel + i]
        for i in range(lanes, _LANES):
            tile[n, i] = 0


@_inline
def _store_rows(tile, lanes, rows, channel):
    for n in range(len(tile)):
        for i in range(lanes):
            rows[n, channel + i] = tile[n, i]


@_inline
def _compute_steps(count, u_tile, x_tile, bias, softplus, step_tile, drive_tile):
    """x becomes x + bias; step = softplus(x) or x, drive = step * u."""
    for t in range(count):
        u, x, step, drive = u_tile[t], x_tile[t], step_tile[t], drive_tile[t]
        for i in range(_LANES):
            x[i] += bias[i]
        if softplus:
            for i in range(_LANES):
                step[i] = _softplus(x[i])
        else:
            for i in range(_LANES):
                step[i] = x[i]
        for i in range(_LANES):
            drive[i] = step[i] * u[i]


def _forward_blocks(u, delta, per_channel, softplus, B, C, first, end, y, last, states):
    """Blocks `first` to `end` - 1 of all sequences. No states are kept where `states` has no room for any."""
    length, dim, state = y.shape[1], y.shape[2], B.shape[2]
    blocks = -(-dim // _LANES)
    constants, h = np.empty((state + 2, _LANES), _F), np.empty((state, _LANES), _F)
    tiles = np.empty((5, _TOKENS, _LANES), _F)
    u_tile, x_tile, step_tile, drive_tile, y_tile = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]
    for block in range(first, end):
        b, channel = block // blocks, block % blocks * _LANES
        lanes = min(_LANES, dim - channel)
        _load_rows(per_channel, channel, lanes, constants)
        D, bias = constants[state], constants[state + 1]
        h[:] = 0
        for chunk in range(-(-length // _TOKENS)):
            start = chunk * _TOKENS
            count = min(_TOKENS, length - start)
            if len(states) > 0:
                _store_rows(h, lanes, states[chunk, b], channel)
            _load_tokens(u, b, start, count, channel, lanes, u_tile)
            _load_tokens(delta, b, start, count, channel, lanes, x_tile)
            _compute_steps(count, u_tile, x_tile, bias, softplus, step_tile, drive_tile)
            for t in range(count):
                step, drive, y_t, u_t = step_tile[t], drive_tile[t], y_tile[t], u_tile[t]
                for i in range(_LANES):
                    y_t[i] = u_t[i] * D[i]
                for n in range(state):
                    rate, h_n, B_n, C_n = constants[n], h[n], B[b, start + t, n], C[b, start + t, n]
                    for i in range(_LANES):
                        value = _exp2(step[i] * rate[i]) * h_n[i] + drive[i] * B_n
                        h_n[i] = value
                        y_t[i] += value * C_n
            _store_tokens(y_tile, count, lanes, y, b, start, channel)
        _store_rows(h, lanes, last[b], channel)


def _backward_blocks(
    grad_y,
    u,
    delta,
    per_channel,
    softplus,
    B,
    C,
    states,
    first,
    end,
    grad_u,
    grad_delta,
    grad_per_channel,
    grad_B,
    grad_C,
):
    """The gradients by way of blocks `first` to `end` - 1; those of B and C are added to what is there."""
    length, dim, state = grad_u.shape[1], grad_u.shape[2], B.shape[2]
    blocks = -(-dim // _LANES)
    rows = np.empty((3, state + 2, _LANES), _F)
    constants, sums, parts = rows[0], rows[1], rows[2]
    tiles = np.empty((5, _TOKENS, _LANES), _F)
    u_tile, x_tile, step_tile, drive_tile, dy_tile = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]
    h = np.empty((_TOKENS + 1, state, _LANES), _F)  # before each token, and after the last
    decays = np.empty((_TOKENS, state, _LANES), _F)
    g = np.empty((state, _LANES), _F)  # of the states: g_t = C_t dy_t + decay_(t+1) g_(t+1)
    grads = np.empty((3, _LANES), _F)
    grad_drive, grad_step, grad_exponent = grads[0], grads[1], grads[2]
    for block in range(first, end):
        b, channel = block // blocks, block % blocks * _LANES
        lanes = min(_LANES, dim - channel)
        _load_rows(per_channel, channel, lanes, constants)
        D, bias = constants[state], constants[state + 1]
        g[:] = 0
        sums[:] = 0
        for chunk in range((length - 1) // _TOKENS, -1, -1):
            start = chunk * _TOKENS
            count = min(_TOKENS, length - start)
            _load_tokens(u, b, start, count, channel, lanes, u_tile)
            _load_tokens(delta, b, start, count, channel, lanes, x_tile)
            _load_tokens(grad_y, b, start, count, channel, lanes, dy_tile)
            _compute_steps(count, u_tile, x_tile, bias, softplus, step_tile, drive_tile)
            _load_rows(states[chunk, b], channel, lanes, h[0])
            for t in range(count):
                step, drive = step_tile[t], drive_tile[t]
                for n in range(state):
                    rate, decay, before, after = constants[n], decays[t, n], h[t, n], h[t + 1, n]
                    B_n = B[b, start + t, n]
                    for i in range(_LANES):
                        factor = _exp2(step[i] * rate[i])
                        decay[i] = factor
                        after[i] = factor * before[i] + drive[i] * B_n
            # a chunk's sums apart from those of all chunks: many small numbers are lost in a large one
            parts[:] = 0
            for t in range(count - 1, -1, -1):
                u_t, x, step, drive, dy = u_tile[t], x_tile[t], step_tile[t], drive_tile[t], dy_tile[t]
                grad_drive[:] = 0
                grad_step[:] = 0
                # few arrays in a loop: of many, LLVM doesn't check that they lie apart, and stays scalar
                for n in range(state):
                    rate, decay, before, after = constants[n], decays[t, n], h[t, n], h[t + 1, n]
                    g_n, part, B_n, C_n = g[n], parts[n], B[b, start + t, n], C[b, start + t, n]
                    grad_C[b, start + t, n] += _dot(dy, after)
                    for i in range(_LANES):
                        g_n[i] += dy[i] * C_n
                    grad_B[b, start + t, n] += _dot(drive, g_n)
                    for i in range(_LANES):
                        grad_drive[i] += g_n[i] * B_n
                    for i in range(_LANES):
                        g_n[i] *= decay[i]
                        grad_exponent[i] = g_n[i] * before[i]
                    for i in range(_LANES):
                        grad_step[i] += grad_exponent[i] * rate[i]
                        part[i] += grad_exponent[i] * step[i]
                part_D, part_bias = parts[state], parts[state + 1]
                for i in range(_LANES):
                    part_D[i] += dy[i] * u_t[i]
                for i in range(_LANES):
                    grad_step[i] = grad_step[i] * _LN_2 + grad_drive[i] * u_t[i]
                for i in range(_LANES):
                    u_t[i] = grad_drive[i] * step[i] + dy[i] * D[i]
                if softplus:
                    for i in range(_LANES):
                        x[i] = grad_step[i] * _sigmoid(x[i])
                else:
                    for i in range(_LANES):
                        x[i] = grad_step[i]
                for i in range(_LANES):
                    part_bias[i] += x[i]
            for n in range(state + 2):
                for i in range(_LANES):
                    sums[n, i] += parts[n, i]
            _store_tokens(u_tile, count, lanes, grad_u, b, start, channel)
            _store_tokens(x_tile, count, lanes, grad_delta, b, start, channel)
        _store_rows(sums, lanes, grad_per_channel[b], channel)


def _floats(dimensions, layout="C"):
    return types.Array(types.float32, dimensions, layout)


_TOKENS_ANYWHERE, _TOKENS_PACKED = _floats(3, "A"), _floats(3)
_INPUTS = (_TOKENS_ANYWHERE, _TOKENS_ANYWHERE, _floats(2), types.boolean, _TOKENS_PACKED, _TOKENS_PACKED)
_SIGNATURES = {
    _forward_blocks: (*_INPUTS, types.intp, types.intp, _TOKENS_PACKED, _TOKENS_PACKED, _floats(4)),
    _backward_blocks: (_TOKENS_ANYWHERE, *_INPUTS, _floats(4), types.intp, types.intp, *[_TOKENS_PACKED] * 5),
}


@functools.cache
def _compiled(kernel):
    """Machine code of a kernel, made at its first use in seconds and then kept on disk."""
    signature = types.void(*_SIGNATURES[kernel])
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return njit(signature, cache=True, **options)(kernel)
    except RuntimeError:  # nowhere to write
        return njit(signature, **options)(kernel)


# ------------------------------------------------------------------------------------------------ threads
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp_parallel():
    """The entry to the OpenMP threads that torch itself uses, or None where they have another one.

    These spin for milliseconds after every operator, longer than a scan takes; others would have to share their cores.
    """
    try:
        (library,) = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (ValueError, OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


def _run_shares(run: Callable[[int], None], shares: int):
    """run(0) to run(shares - 1), each on a thread of its own where there are as many."""
    if shares == 1:
        return run(0)
    parallel = _openmp_parallel()
    if parallel is None:
        with ThreadPoolExecutor(shares) as threads:
            list(threads.map(run, range(shares)))
        return
    left, failures = iter(range(shares)), []

    def take(_):
        try:
            for share in left:
                run(share)
        except BaseException as failure:  # it can't pass through OpenMP
            failures.append(failure)

    parallel(_CALLBACK(take), None, shares, 0)
    if failures:
        raise failures[0]


def _share_count(batch, dim):
    return min(torch.get_num_threads(), _blocks(batch, dim))


def _blocks(batch, dim):
    return batch * -(-dim // _LANES)


def _in_blocks(run: Callable[[int, int, int], None], batch: int, dim: int):
    """run(share, first, end) for all blocks of channels of all sequences, split among threads."""
    blocks, shares = _blocks(batch, dim), _share_count(batch, dim)
    bounds = [blocks * share // shares for share in range(shares + 1)]
    _run_shares(lambda share: run(share, bounds[share], bounds[share + 1]), shares)


# ------------------------------------------------------------------------------------------------ torch
def _in_place(x):
    """(batch, channels, length) as an array (batch, length, channels) of the same memory, where that is float32."""
    return x.detach().transpose(1, 2).float().numpy()


def _packed(x):
    return x.detach().transpose(1, 2).float().contiguous().numpy()


def _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus):
    nothing = A.new_zeros(len(A))
    vectors = torch.stack([nothing if x is None else x.detach() for x in (D, delta_bias)]).float()
    per_channel = torch.cat([A.detach().t().float() * float(_LOG2_E), vectors]).numpy()
    return _in_place(u), _in_place(delta), per_channel, delta_softplus, _packed(B), _packed(C)


def numba_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    """y, the last state (batch, dim, state), and the kept states (chunk, batch, state, dim) that enter the chunks."""
    (batch, dim, length), state = u.shape, A.shape[1]
    y = u.new_empty(batch, length, dim, dtype=torch.float32)
    last_state = y.new_empty(batch, state, dim)
    states = y.new_empty(-(-length // _TOKENS) if keep_states else 0, batch, state, dim)
    kernel, inputs = _compiled(_forward_blocks), _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    results = y.numpy(), last_state.numpy(), states.numpy()
    _in_blocks(lambda share, first, end: kernel(*inputs, first, end, *results), batch, dim)
    return y.to(u.dtype).transpose(1, 2), last_state.transpose(1, 2), states


def numba_scan_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    """Gradients of u, delta, A, B, C, D and delta_bias, in float32."""
    (batch, dim, length), state = u.shape, A.shape[1]
    grad_u, grad_delta = (states.new_empty(batch, length, dim) for _ in range(2))
    grad_per_channel = states.new_empty(batch, state + 2, dim)
    # every share of the work sums over its channels on its own
    grad_B, grad_C = (states.new_zeros(_share_count(batch, dim), batch, length, state) for _ in range(2))
    kernel, inputs = _compiled(_backward_blocks), _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    dy, states = _in_place(grad_y), states.numpy()
    grads = [grad.numpy() for grad in (grad_u, grad_delta, grad_per_channel)]
    shares = list(zip(grad_B.numpy(), grad_C.numpy(), strict=True))
    _in_blocks(lambda share, *blocks: kernel(dy, *inputs, states, *blocks, *grads, *shares[share]), batch, dim)
    grad_A, grad_D, grad_bias = (rows.sum(0) for rows in grad_per_channel.tensor_split([state, state + 1], dim=1))
    grad_B, grad_C = (grad.sum(0).transpose(1, 2) for grad in (grad_B, grad_C))
    return grad_u.transpose(1, 2), grad_delta.transpose(1, 2), grad_A.t(), grad_B, grad_C, grad_D[0], grad_bias[0]
