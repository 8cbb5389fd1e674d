"""The selective scan as Triton kernels: any length, dim and state size, float32 arithmetic, deterministic.

Forward is three launches, each parallel over chunks of tokens, blocks of channels and the batch. They compute the
final state of every chunk from an initial state of zero, the initial states of all chunks, and the outputs. Backward
runs the first two in reverse for the gradients of the states, then computes all other gradients. Memory is O(batch *
length * dim): the initial state of each chunk is kept, and the states within a chunk are recomputed, quadratically in
its few tokens.
"""

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels of the selective scan need the package `triton`.") from error

__all__ = ["TRITON_CHUNK_TOKENS", "triton_scan", "triton_scan_backward"]

TRITON_CHUNK_TOKENS = 32
_BLOCK_CHANNELS = 16
_LOG2_E = 1 / math.log(2)


# Memory is token-major: (batch, length, dim) and (batch, length, state), contiguous; states are (chunk, batch, state,
# dim). Tiles are (state, channel) with indices n and d. Token numbers count through the flattened (batch, length) in
# 64 bits, as offsets exceed 32 bits in large batches.
@triton.jit
def _tile(dim, state, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    return d, n, n[:, None] * dim + d[None, :], (n < state)[:, None] & (d < dim)[None, :]


@triton.jit
def _load_row(pointer, token, index, size):
    return tl.load(pointer + token * size + index, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def _store_row(pointer, token, index, size, value):
    tl.store(pointer + token * size + index, value, mask=index < size)


@triton.jit
def _chunk_ends(
    inflow_ptr,
    step_ptr,
    rates_ptr,
    weight_ptr,
    end_ptr,
    total_ptr,
    length,
    dim,
    state,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The final state of each chunk from an initial state of zero, and the sum of its steps.

    In the forward direction, the input is u, weighted by B. In reverse, it is dy, weighted by C, and the result is
    decay * gradient of the chunk's first state, which is the input of the chunk to the left.
    """
    chunk, batch = tl.program_id(0), tl.program_id(2)
    d, n, tile, inside = _tile(dim, state, BLOCK_D, BLOCK_N)
    rates = tl.load(rates_ptr + tile, mask=inside, other=0.0)
    first = batch.to(tl.int64) * length + chunk * CHUNK
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.minimum(CHUNK, length - chunk * CHUNK)
    for i in range(count):
        t = count - 1 - i if REVERSE else i
        step = _load_row(step_ptr, first + t, d, dim)
        inflow = _load_row(inflow_ptr, first + t, d, dim)
        weight = _load_row(weight_ptr, first + t, n, state)
        decay = tl.exp2(step[None, :] * rates)
        if REVERSE:
            h = decay * (h + inflow[None, :] * weight[:, None])
        else:
            h = decay * h + (step * inflow)[None, :] * weight[:, None]
        total += step
    row = chunk.to(tl.int64) * tl.num_programs(2) + batch
    tl.store(end_ptr + row * state * dim + tile, h, mask=inside)
    tl.store(total_ptr + row * dim + d, total, mask=d < dim)


@triton.jit
def _hand_on(
    state_ptr,
    total_ptr,
    rates_ptr,
    last_ptr,
    length,
    dim,
    state,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Turns, in place, the final states from zero into the initial states of the chunks; also gives the last state."""
    batch = tl.program_id(2)
    d, n, tile, inside = _tile(dim, state, BLOCK_D, BLOCK_N)
    rates = tl.load(rates_ptr + tile, mask=inside, other=0.0)
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        row = tl.cast(chunk, tl.int64) * tl.num_programs(2) + batch
        end = tl.load(state_ptr + row * state * dim + tile, mask=inside, other=0.0)
        total = tl.load(total_ptr + row * dim + d, mask=d < dim, other=0.0)
        tl.store(state_ptr + row * state * dim + tile, h, mask=inside)
        h = tl.exp2(total[None, :] * rates) * h + end
    tl.store(last_ptr + batch.to(tl.int64) * state * dim + tile, h, mask=inside)


@triton.jit
def _outputs(
    u_ptr,
    step_ptr,
    rates_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    state_ptr,
    y_ptr,
    length,
    dim,
    state,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    chunk, batch = tl.program_id(0), tl.program_id(2)
    d, n, tile, inside = _tile(dim, state, BLOCK_D, BLOCK_N)
    rates = tl.load(rates_ptr + tile, mask=inside, other=0.0)
    skip = tl.load(D_ptr + d, mask=d < dim, other=0.0)
    row = chunk.to(tl.int64) * tl.num_programs(2) + batch
    h = tl.load(state_ptr + row * state * dim + tile, mask=inside, other=0.0)
    first = batch.to(tl.int64) * length + chunk * CHUNK
    for t in range(tl.minimum(CHUNK, length - chunk * CHUNK)):
        step = _load_row(step_ptr, first + t, d, dim)
        u = _load_row(u_ptr, first + t, d, dim)
        B = _load_row(B_ptr, first + t, n, state)
        C = _load_row(C_ptr, first + t, n, state)
        h = tl.exp2(step[None, :] * rates) * h + (step * u)[None, :] * B[:, None]
        _store_row(y_ptr, first + t, d, dim, tl.sum(h * C[:, None], 0) + skip * u)


@triton.jit
def _gradients(
    dy_ptr,
    u_ptr,
    step_ptr,
    rates_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    state_ptr,
    from_right_ptr,
    grad_u_ptr,
    grad_step_ptr,
    grad_A_ptr,
    grad_B_ptr,
    grad_C_ptr,
    length,
    dim,
    state,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of u and step; of A for each chunk and batch; of B and C for each block of channels."""
    chunk, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, n, tile, inside = _tile(dim, state, BLOCK_D, BLOCK_N)
    rates = tl.load(rates_ptr + tile, mask=inside, other=0.0)
    skip = tl.load(D_ptr + d, mask=d < dim, other=0.0)
    row = chunk.to(tl.int64) * tl.num_programs(2) + batch
    entering = tl.load(state_ptr + row * state * dim + tile, mask=inside, other=0.0)
    from_right = tl.load(from_right_ptr + row * state * dim + tile, mask=inside, other=0.0)
    grad_A = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = batch.to(tl.int64) * length + chunk * CHUNK
    partial = block.to(tl.int64) * tl.num_programs(2) * length + first
    count = tl.minimum(CHUNK, length - chunk * CHUNK)
    for i in range(count):
        t = count - 1 - i
        before = entering
        for s in range(t):
            step = _load_row(step_ptr, first + s, d, dim)
            u = _load_row(u_ptr, first + s, d, dim)
            B = _load_row(B_ptr, first + s, n, state)
            before = tl.exp2(step[None, :] * rates) * before + (step * u)[None, :] * B[:, None]
        dy = _load_row(dy_ptr, first + t, d, dim)
        step = _load_row(step_ptr, first + t, d, dim)
        u = _load_row(u_ptr, first + t, d, dim)
        B = _load_row(B_ptr, first + t, n, state)
        C = _load_row(C_ptr, first + t, n, state)
        decay = tl.exp2(step[None, :] * rates)
        h = decay * before + (step * u)[None, :] * B[:, None]
        g = dy[None, :] * C[:, None] + from_right
        from_right = decay * g
        grad_exponent = from_right * before  # of step * A
        grad_drive = tl.sum(g * B[:, None], 0)
        grad_A += grad_exponent * step[None, :]
        grad_step = grad_drive * u + tl.sum(grad_exponent * rates, 0) * 0.6931471805599453
        _store_row(grad_u_ptr, first + t, d, dim, grad_drive * step + dy * skip)
        _store_row(grad_step_ptr, first + t, d, dim, grad_step)
        _store_row(grad_B_ptr, partial + t, n, state, tl.sum(g * (step * u)[None, :], 1))
        _store_row(grad_C_ptr, partial + t, n, state, tl.sum(h * dy[None, :], 1))
    tl.store(grad_A_ptr + row * state * dim + tile, grad_A, mask=inside)


class _Launcher:
    """The inputs in the layout of the kernels, and launches over chunks, blocks of channels and the batch."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, delta_softplus):
        self.batch, dim, length = u.shape
        state = A.shape[1]
        self.u, self.B, self.C = (_token_major(x) for x in (u, B, C))
        step = _token_major(delta).float()
        if delta_bias is not None:
            step = step + delta_bias.float()
        self.step = F.softplus(step) if delta_softplus else step
        self.rates = (A.t().float() * _LOG2_E).contiguous()
        self.D = self.rates.new_zeros(dim) if D is None else D.float().contiguous()
        self.chunks = triton.cdiv(length, TRITON_CHUNK_TOKENS)
        self.channel_blocks = triton.cdiv(dim, _BLOCK_CHANNELS)
        block_n = triton.next_power_of_2(state)
        self.sizes = {
            "length": length,
            "dim": dim,
            "state": state,
            "CHUNK": TRITON_CHUNK_TOKENS,
            "BLOCK_D": _BLOCK_CHANNELS,
            "BLOCK_N": block_n,
            "num_warps": min(8, max(1, block_n * _BLOCK_CHANNELS // 512)),
        }

    def launch(self, kernel, chunks, *tensors, **options):
        with torch.cuda.device_of(self.u):
            kernel[chunks, self.channel_blocks, self.batch](*tensors, **self.sizes, **options)

    def entering_states(self, inflow, weight, reverse):
        """The initial states of the chunks (chunk, batch, state, dim), and the final state of the last one."""
        states = self.rates.new_empty(self.chunks, self.batch, *self.rates.shape)
        totals = self.rates.new_empty(self.chunks, self.batch, self.rates.shape[1])
        last = torch.empty_like(states[0])
        ends = (inflow, self.step, self.rates, weight, states, totals)
        self.launch(_chunk_ends, self.chunks, *ends, REVERSE=reverse)
        self.launch(_hand_on, 1, states, totals, self.rates, last, REVERSE=reverse)
        return states, last


def _token_major(x):
    return x.transpose(1, 2).contiguous()


def triton_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    """y, the last state and, with `keep_states`, the initial states of the chunks (chunk, batch, state, dim)."""
    scan = _Launcher(u, delta, A, B, C, D, delta_bias, delta_softplus)
    states, last_state = scan.entering_states(scan.u, scan.B, reverse=False)
    y = torch.empty_like(scan.u)
    scan.launch(_outputs, scan.chunks, scan.u, scan.step, scan.rates, scan.B, scan.C, scan.D, states, y)
    return (
        y.transpose(1, 2),
        last_state.transpose(1, 2),
        states if keep_states else states.new_empty(0, *states.shape[1:]),
    )


def triton_scan_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    """Gradients of u, delta, A, B, C, D and delta_bias; None for an absent D or delta_bias."""
    scan = _Launcher(u, delta, A, B, C, D, delta_bias, delta_softplus)
    dy = _token_major(grad_y)
    from_right, _ = scan.entering_states(dy, scan.C, reverse=True)
    grad_u, grad_step = torch.empty_like(scan.u), torch.empty_like(scan.step)
    grad_A = torch.empty_like(states)
    grad_B, grad_C = scan.step.new_empty(2, scan.channel_blocks, *scan.B.shape)
    scan.launch(
        _gradients,
        scan.chunks,
        *(dy, scan.u, scan.step, scan.rates, scan.B, scan.C, scan.D, states, from_right),
        *(grad_u, grad_step, grad_A, grad_B, grad_C),
    )
    if delta_softplus:
        grad_step = grad_step * -torch.expm1(-scan.step)  # sigmoid(x) = 1 - exp(-softplus(x))
    return (
        grad_u.transpose(1, 2),
        grad_step.transpose(1, 2),
        grad_A.sum((0, 1)).t(),
        grad_B.sum(0).transpose(1, 2),
        grad_C.sum(0).transpose(1, 2),
        None if D is None else (dy.float() * scan.u.float()).sum((0, 1)),
        None if delta_bias is None else grad_step.sum((0, 1)),
    )
