"""
The selective scan for CPUs as machine code compiled by numba, without a C compiler.

Channels are independent, so they are processed in blocks whose states fit into the first-level cache. Blocks run in
parallel on Python threads; the kernels release the GIL. Every block writes its own results, hence the results do not
depend on the number of threads. All arithmetic is float32.

Arrays are channels-last and split into blocks: (batch, length, blocks, `_LANES`) for tokens, (state, blocks, `_LANES`)
for rates. Gradients of the states are g_t = C_t dy_t + decay_(t+1) g_(t+1).
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

try:
    from numba import njit
except ImportError as error:
    raise ImportError("The selective scan as machine code for CPUs needs the package `numba`.") from error

__all__ = ["NUMBA_CHUNK_TOKENS", "numba_scan", "numba_scan_backward"]

NUMBA_CHUNK_TOKENS = _TOKENS = 32
_LANES = 64  # channels in a block
_F = np.float32
_LN_2, _LOG2_E = _F(math.log(2)), _F(1 / math.log(2))
_ROUND = _F(1.5 * 2**23)  # the sum of this and a small number has the nearest integer in its low bits
# 2^f on [-1/2, 1/2] within 1.1e-7. Value and slope at 0 are exact: errors of decays near 1 accumulate over tokens.
_EXP2 = tuple(map(_F, (1.0, math.log(2), 0.2402228160, 0.0555055999, 0.0096697089, 0.0013300265)))


def _compiled(reassociate=False):
    """`numba.njit` with a cache on disk where the folder is writable."""
    options = {"nogil": True, "fastmath": {"contract", "reassoc"} if reassociate else {"contract"}}

    def decorate(kernel):
        try:
            return njit(cache=True, **options)(kernel)
        except RuntimeError:  # numba found no writable folder
            return njit(**options)(kernel)

    return decorate


@_compiled()
def _exp2(x):
    x = _F(-126) if x < _F(-126) else x  # unlike max(), this keeps NaN
    x = _F(128) if x > _F(128) else x
    rounded = x + _ROUND
    f = (_ROUND - rounded) + x
    power = _EXP2[0] + f * (_EXP2[1] + f * (_EXP2[2] + f * (_EXP2[3] + f * (_EXP2[4] + f * _EXP2[5]))))
    # adding to the exponent bits multiplies by a power of two
    bits = _F(power).view(np.int32) + np.int32(_F(rounded).view(np.int32) << np.int32(23))
    return np.int32(bits).view(np.float32)


@_compiled(reassociate=True)
def _dot(a, b):
    total = _F(0)
    for i in range(_LANES):
        total += a[i] * b[i]
    return total


@_compiled()
def _advance(u, step, rates, B, drive, before, decays, after):
    """One token: after = decay * before + step * u * B, decay = 2^(step * rate)."""
    for i in range(_LANES):
        drive[i] = step[i] * u[i]
    for n in range(len(B)):
        rate, before_n, decay, after_n, B_n = rates[n], before[n], decays[n], after[n], B[n]
        for i in range(_LANES):
            decay[i] = _exp2(step[i] * rate[i])
        for i in range(_LANES):
            after_n[i] = decay[i] * before_n[i] + drive[i] * B_n


@_compiled()
def _forward(b, block, u, step, per_channel, B, C, y, last_state, states):
    """One block of channels of one sequence; states entering the chunks are kept where `states` has room for them."""
    length, state = B.shape[1:]
    rates, D = per_channel[block, :state], per_channel[block, state]
    h = np.zeros((2, state, _LANES), _F)
    decays, drive = np.empty((state, _LANES), _F), np.empty(_LANES, _F)
    for t in range(length):
        before, after = h[t % 2], h[(t + 1) % 2]
        if len(states) > 0 and t % _TOKENS == 0:
            states[t // _TOKENS, b, :, block] = before
        u_t, y_t = u[b, t, block], y[b, t, block]
        _advance(u_t, step[b, t, block], rates, B[b, t], drive, before, decays, after)
        for i in range(_LANES):
            y_t[i] = u_t[i] * D[i]
        for n in range(state):
            h_n, C_n = after[n], C[b, t, n]
            for i in range(_LANES):
                y_t[i] += h_n[i] * C_n
    last_state[b, :, block] = h[length % 2]


@_compiled()
def _backward(b, block, u, step, per_channel, B, C, dy, states, grad_u, grad_step, grad_per_channel, grad_B, grad_C):
    """Gradients for one block of channels of one sequence; each chunk's states are recomputed from the kept one."""
    length, state = B.shape[1:]
    rates, D = per_channel[block, :state], per_channel[block, state]
    h = np.empty((_TOKENS + 1, state, _LANES), _F)  # before each token and after the last
    decays = np.empty((_TOKENS, state, _LANES), _F)
    g = np.zeros((state, _LANES), _F)
    sums, chunk_sums = np.zeros((state + 1, _LANES), _F), np.empty((state + 1, _LANES), _F)
    sum_D = chunk_sums[state]
    rows = np.empty((3, _LANES), _F)
    drive, grad_drive, grad_exponent = rows[0], rows[1], rows[2]
    for chunk in range((length - 1) // _TOKENS, -1, -1):
        start = chunk * _TOKENS
        count = min(_TOKENS, length - start)
        h[0] = states[chunk, b, :, block]
        for i in range(count):
            t = start + i
            _advance(u[b, t, block], step[b, t, block], rates, B[b, t], drive, h[i], decays[i], h[i + 1])
        # summed per chunk first: many small numbers would be lost in a large one
        chunk_sums[:] = 0
        for k in range(count - 1, -1, -1):
            t = start + k
            u_t, step_t, dy_t = u[b, t, block], step[b, t, block], dy[b, t, block]
            grad_u_t, grad_step_t = grad_u[b, t, block], grad_step[b, t, block]
            for i in range(_LANES):
                drive[i] = step_t[i] * u_t[i]
            grad_drive[:] = 0
            grad_step_t[:] = 0
            # Loops over few arrays each: LLVM checks those for overlap and vectorises them.
            for n in range(state):
                rate, decay, before, after = rates[n], decays[k, n], h[k, n], h[k + 1, n]
                g_n, sum_n, B_n, C_n = g[n], chunk_sums[n], B[b, t, n], C[b, t, n]
                grad_C[block, b, t, n] = _dot(dy_t, after)
                for i in range(_LANES):
                    g_n[i] += dy_t[i] * C_n
                grad_B[block, b, t, n] = _dot(drive, g_n)
                for i in range(_LANES):
                    grad_drive[i] += g_n[i] * B_n
                for i in range(_LANES):
                    g_n[i] *= decay[i]
                    grad_exponent[i] = g_n[i] * before[i]
                for i in range(_LANES):
                    grad_step_t[i] += grad_exponent[i] * rate[i]
                    sum_n[i] += grad_exponent[i] * step_t[i]
            for i in range(_LANES):
                grad_step_t[i] = grad_step_t[i] * _LN_2 + grad_drive[i] * u_t[i]
            for i in range(_LANES):
                grad_u_t[i] = grad_drive[i] * step_t[i] + dy_t[i] * D[i]
            for i in range(_LANES):
                sum_D[i] += dy_t[i] * u_t[i]
        for n in range(state + 1):
            for i in range(_LANES):
                sums[n, i] += chunk_sums[n, i]
    grad_per_channel[b, block] = sums


def _in_parallel(kernel, *tensors):
    """Runs `kernel` on every block of channels of every sequence; a thread that is free takes the next one."""
    batch, _, blocks, _ = tensors[0].shape
    arrays = [x.numpy() for x in tensors]
    threads = min(torch.get_num_threads(), batch * blocks)
    if threads == 1:
        for b, block in np.ndindex(batch, blocks):
            kernel(b, block, *arrays)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda index: kernel(*index, *arrays), np.ndindex(batch, blocks)))


def _in_blocks(x):
    """(..., dim) as (..., blocks, `_LANES`) in float32; lanes beyond the last channel are zero."""
    x = F.pad(x.detach().float(), (0, -x.shape[-1] % _LANES))
    return x.contiguous().unflatten(-1, (-1, _LANES))


def _channels(x, dim):
    """The inverse of `_in_blocks`."""
    return x.flatten(-2)[..., :dim].contiguous()


def _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """The tensors that both kernels take; row `state` of `per_channel` is D, those before are the rates."""
    step = delta.detach().transpose(1, 2).to(torch.float32, copy=True)
    if delta_bias is not None:
        step.add_(delta_bias.detach())
    if delta_softplus:
        torch.ops.aten.softplus.out(step, out=step)  # in place: new memory costs more than the arithmetic
    skip = A.new_zeros(len(A)) if D is None else D
    per_channel = torch.cat([A.detach().float() * float(_LOG2_E), skip.detach().float()[:, None]], dim=1).t()
    u, step, per_channel = (_in_blocks(x) for x in (u.transpose(1, 2), step, per_channel))
    B, C = (x.detach().transpose(1, 2).float().contiguous() for x in (B, C))
    return u, step, per_channel.transpose(0, 1).contiguous(), B, C


def numba_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    """y, the last state (batch, dim, state), and the kept states (chunk, batch, state, dim) that enter the chunks."""
    (batch, dim, length), state = u.shape, A.shape[1]
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    y = torch.empty_like(inputs[0])
    last_state = y.new_empty(batch, state, *y.shape[2:])
    states = y.new_empty(-(-length // _TOKENS) if keep_states else 0, *last_state.shape)
    _in_parallel(_forward, *inputs, y, last_state, states)
    y, last_state, states = (_channels(x, dim) for x in (y, last_state, states))
    return y.to(u.dtype).transpose(1, 2), last_state.transpose(1, 2), states


def numba_scan_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    """Gradients of u, delta, A, B, C, D and delta_bias, in float32."""
    (batch, dim, length), state = u.shape, A.shape[1]
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    u, step, per_channel, *_ = inputs
    grad_u, grad_step = torch.empty_like(u), torch.empty_like(u)
    grad_per_channel = u.new_empty(batch, *per_channel.shape)
    grad_B, grad_C = (u.new_empty(len(per_channel), batch, length, state) for _ in range(2))
    dy, states = _in_blocks(grad_y.transpose(1, 2)), _in_blocks(states)
    _in_parallel(_backward, *inputs, dy, states, grad_u, grad_step, grad_per_channel, grad_B, grad_C)
    if delta_softplus:
        grad_step.mul_(step.neg_().expm1_().neg_())  # sigmoid(x) = 1 - exp(-softplus(x))
    grad_u, grad_step = (_channels(x, dim).transpose(1, 2) for x in (grad_u, grad_step))
    rows = _channels(grad_per_channel.sum(0).transpose(0, 1), dim)
    grad_B, grad_C = (grad.sum(0).transpose(1, 2) for grad in (grad_B, grad_C))
    return grad_u, grad_step, rows[:-1].t(), grad_B, grad_C, rows[-1].clone(), grad_step.sum((0, 2))
