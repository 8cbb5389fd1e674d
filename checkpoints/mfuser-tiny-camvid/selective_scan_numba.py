"""
The selective scan on a CPU as machine code that numba compiles; no C compiler is needed.

Channels do not depend on each other. A block of them goes through the whole sequence, so that its states stay in the
first-level cache. The blocks run in parallel on Python threads, as the kernels release the GIL, and every block writes
its own results: they do not depend on the number of threads. The states entering each chunk of tokens are stored for
backward, which recomputes the others from them. All arithmetic is float32.

The kernels take contiguous arrays: u, step, y, dy of shape (batch, length, dim); B, C (batch, length, state); rates
(state, dim), which are A log2(e); D (dim,); states (chunk, batch, state, dim).
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

try:
    from numba import njit
except ImportError as error:
    raise ImportError("The selective scan as machine code for CPUs needs the package `numba`.") from error

__all__ = ["NUMBA_CHUNK_TOKENS", "numba_scan", "numba_scan_backward"]

NUMBA_CHUNK_TOKENS = _TOKENS = 32
_BLOCK = 64  # channels in a block
_F = np.float32
_LN_2, _LOG2_E = _F(math.log(2)), _F(1 / math.log(2))
_ROUND = _F(1.5 * 2**23)  # the low bits of x + _ROUND are the integer nearest to x
# 2^f on [-1/2, 1/2] within 1.1e-7. Value and slope at 0 are exact: errors of decays near 1 accumulate over tokens.
_EXP2 = tuple(map(_F, (1.0, math.log(2), 0.2402228160, 0.0555055999, 0.0096697089, 0.0013300265)))


def _compiled(reassociate=False):
    """`numba.njit`, cached on disk if a folder is writable; `reassociate` lets sums be vectorised."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "reassoc"} if reassociate else {"contract"}}

    def decorate(kernel):
        try:
            return njit(cache=True, **options)(kernel)
        except RuntimeError:  # numba found no writable folder
            return njit(**options)(kernel)

    return decorate


@_compiled()
def _exp2(x):
    """2^x as arithmetic that LLVM turns into vector instructions, unlike a call of a library."""
    x = _F(-126) if x < _F(-126) else x  # unlike max(), this keeps NaN
    x = _F(128) if x > _F(128) else x
    rounded = x + _ROUND
    f = (_ROUND - rounded) + x
    power = _EXP2[0] + f * (_EXP2[1] + f * (_EXP2[2] + f * (_EXP2[3] + f * (_EXP2[4] + f * _EXP2[5]))))
    # The integer is added to the exponent bits, which multiplies by 2^integer.
    bits = _F(power).view(np.int32) + np.int32(_F(rounded).view(np.int32) << np.int32(23))
    return np.int32(bits).view(np.float32)


@_compiled(reassociate=True)
def _dot(a, b):
    total = _F(0)
    for i in range(_BLOCK):
        total += a[i] * b[i]
    return total


@_compiled()
def _load(row, x):
    for i in range(len(x)):
        row[i] = x[i]


@_compiled()
def _advance(u, step, rates, B, drive, decays, h):
    """One token: h becomes decay * h + step * u * B, where decay = 2^(step * rate)."""
    for i in range(_BLOCK):
        drive[i] = step[i] * u[i]
    for n in range(len(B)):
        rate, decay, h_n, B_n = rates[n], decays[n], h[n], B[n]
        for i in range(_BLOCK):
            factor = _exp2(step[i] * rate[i])
            decay[i] = factor
            h_n[i] = factor * h_n[i] + drive[i] * B_n


@_compiled()
def _forward(b, first, u, step, rates, B, C, D, y, last_state, states):
    """One block of channels of one sequence; the states entering the chunks are stored if `states` has room."""
    length, state = B.shape[1:]
    lanes = min(_BLOCK, len(D) - first)
    block = slice(first, first + lanes)
    tiles, rows = np.zeros((3, state, _BLOCK), _F), np.zeros((5, _BLOCK), _F)
    rate, decays, h = tiles[0], tiles[1], tiles[2]
    u_t, step_t, drive, y_t, skip = rows[0], rows[1], rows[2], rows[3], rows[4]
    rate[:, :lanes] = rates[:, block]
    skip[:lanes] = D[block]
    for t in range(length):
        if len(states) > 0 and t % _TOKENS == 0:
            states[t // _TOKENS, b, :, block] = h[:, :lanes]
        _load(u_t, u[b, t, block])
        _load(step_t, step[b, t, block])
        _advance(u_t, step_t, rate, B[b, t], drive, decays, h)
        for i in range(_BLOCK):
            y_t[i] = u_t[i] * skip[i]
        for n in range(state):
            h_n, C_n = h[n], C[b, t, n]
            for i in range(_BLOCK):
                y_t[i] += h_n[i] * C_n
        _load(y[b, t, block], y_t[:lanes])
    last_state[b, :, block] = h[:, :lanes]


@_compiled()
def _backward(b, first, u, step, rates, B, C, D, dy, states, grad_u, grad_step, grad_rates, grad_B, grad_C):
    """The gradients of one block of channels of one sequence; the states of a chunk are recomputed."""
    length, state = B.shape[1:]
    lanes = min(_BLOCK, len(D) - first)
    block, share = slice(first, first + lanes), first // _BLOCK
    tiles, rows = np.zeros((4, state, _BLOCK), _F), np.zeros((6, _BLOCK), _F)
    rate, g, sums, chunk_sums = tiles[0], tiles[1], tiles[2], tiles[3]
    dy_t, skip, grad_u_t, grad_step_t, grad_drive, grad_exponent = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    tokens = np.zeros((3, _TOKENS, _BLOCK), _F)
    u_tile, step_tile, drives = tokens[0], tokens[1], tokens[2]
    h = np.zeros((_TOKENS + 1, state, _BLOCK), _F)  # before each token and after the last
    decays = np.empty((_TOKENS, state, _BLOCK), _F)
    rate[:, :lanes] = rates[:, block]
    skip[:lanes] = D[block]
    for chunk in range((length - 1) // _TOKENS, -1, -1):
        start = chunk * _TOKENS
        count = min(_TOKENS, length - start)
        h[0, :, :lanes] = states[chunk, b, :, block]
        for k in range(count):
            _load(u_tile[k], u[b, start + k, block])
            _load(step_tile[k], step[b, start + k, block])
            h[k + 1] = h[k]
            _advance(u_tile[k], step_tile[k], rate, B[b, start + k], drives[k], decays[k], h[k + 1])
        chunk_sums[:] = 0  # summed per chunk first: many small numbers would be lost in a large one
        for k in range(count - 1, -1, -1):
            t = start + k
            u_t, step_t, drive = u_tile[k], step_tile[k], drives[k]
            _load(dy_t, dy[b, t, block])
            grad_drive[:] = 0
            grad_step_t[:] = 0
            # Each loop uses few arrays: LLVM checks those for overlap and vectorises the loop.
            for n in range(state):
                rate_n, decay, before, after = rate[n], decays[k, n], h[k, n], h[k + 1, n]
                g_n, sum_n, B_n, C_n = g[n], chunk_sums[n], B[b, t, n], C[b, t, n]
                grad_C[share, b, t, n] = _dot(dy_t, after)
                for i in range(_BLOCK):
                    g_n[i] += dy_t[i] * C_n
                grad_B[share, b, t, n] = _dot(drive, g_n)
                for i in range(_BLOCK):
                    grad_drive[i] += g_n[i] * B_n
                for i in range(_BLOCK):
                    g_n[i] *= decay[i]
                    grad_exponent[i] = g_n[i] * before[i]
                for i in range(_BLOCK):
                    grad_step_t[i] += grad_exponent[i] * rate_n[i]
                    sum_n[i] += grad_exponent[i] * step_t[i]
            for i in range(_BLOCK):
                grad_step_t[i] = grad_step_t[i] * _LN_2 + grad_drive[i] * u_t[i]
            for i in range(_BLOCK):
                grad_u_t[i] = grad_drive[i] * step_t[i] + dy_t[i] * skip[i]
            _load(grad_u[b, t, block], grad_u_t[:lanes])
            _load(grad_step[b, t, block], grad_step_t[:lanes])
        sums += chunk_sums
    grad_rates[b, :, block] = sums[:, :lanes]


def _in_parallel(kernel, u, *tensors):
    """Run `kernel` on every block of channels of every sequence; a thread that has finished one takes the next."""
    batch, _, dim = u.shape
    blocks = [(b, first) for b in range(batch) for first in range(0, dim, _BLOCK)]
    arrays, remaining = [x.numpy() for x in (u, *tensors)], iter(blocks)

    def work():
        for b, first in remaining:
            kernel(b, first, *arrays)

    threads = min(torch.get_num_threads(), len(blocks))
    with ThreadPoolExecutor(threads) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
    for other in others:
        other.result()  # raises what the thread raised


def _channels_last(x):
    return x.detach().transpose(1, 2).float().contiguous()


def _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """The tensors that both kernels take."""
    step = delta.detach().transpose(1, 2).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if delta_bias is not None:
        step.add_(delta_bias.detach())
    if delta_softplus:
        torch.ops.aten.softplus.out(step, out=step)  # in place: new memory costs more than the arithmetic
    rates = (A.detach().t().float() * float(_LOG2_E)).contiguous()
    # A copy: an array of a parameter would pin its storage, which FSDP frees.
    skip = rates.new_zeros(len(A)) if D is None else D.detach().to(torch.float32, copy=True)
    return u.detach().transpose(1, 2).float(), step, rates, _channels_last(B), _channels_last(C), skip


def numba_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    """y, the last state (batch, dim, state), and the kept states (chunk, batch, state, dim) that enter the chunks."""
    (batch, dim, length), state = u.shape, A.shape[1]
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    y = torch.empty_like(inputs[1])
    last_state = y.new_empty(batch, state, dim)
    states = y.new_empty(-(-length // _TOKENS) if keep_states else 0, batch, state, dim)
    _in_parallel(_forward, *inputs, y, last_state, states)
    return y.to(u.dtype).transpose(1, 2), last_state.transpose(1, 2), states


def numba_scan_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    """Gradients of u, delta, A, B, C, D and delta_bias, in float32."""
    (batch, dim, length), state = u.shape, A.shape[1]
    u, step, *others = _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    dy = grad_y.transpose(1, 2).float()
    grad_u, grad_step = torch.empty_like(step), torch.empty_like(step)
    grad_rates = u.new_empty(batch, state, dim)
    grad_B, grad_C = (u.new_empty(-(-dim // _BLOCK), batch, length, state) for _ in range(2))
    _in_parallel(_backward, u, step, *others, dy, states, grad_u, grad_step, grad_rates, grad_B, grad_C)
    if delta_softplus:
        grad_step.mul_(step.neg_().expm1_().neg_())  # sigmoid(x) = 1 - exp(-softplus(x))
    grad_A, grad_D, grad_bias = grad_rates.sum(0).t(), torch.mul(dy, u, out=step).sum((0, 1)), grad_step.sum((0, 1))
    grad_B, grad_C = (grad.sum(0).transpose(1, 2) for grad in (grad_B, grad_C))
    return grad_u.transpose(1, 2), grad_step.transpose(1, 2), grad_A, grad_B, grad_C, grad_D, grad_bias
