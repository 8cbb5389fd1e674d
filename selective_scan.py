"""The selective scan of Mamba (arXiv 2312.00752), differentiable, on any device.

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t        y_t = <C_t, h_t> + D u_t

for every channel on its own: `h_t` holds `state` numbers a channel. Written out, the states of a sequence take
(batch, dim, length, state) numbers, which is what makes a plain implementation slow and large. Here the sequence is
cut into chunks: only the state that enters a chunk is kept, everything else is recomputed in backward.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["selective_scan"]

# Bytes that the states of one chunk may take: on a CPU they should stay in cache, on a GPU a chunk should be wide.
_CHUNK_BYTES = {"cpu": 5 << 19, "gpu": 1 << 26}
_LOG2_E = 1 / math.log(2)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with input-dependent steps; the signature and the meaning are those of `mamba_ssm`.

    Args:
        u: (batch, dim, length), the input.
        delta: (batch, dim, length), the step sizes, before `delta_bias` and softplus.
        A: (dim, state), the rates; negative for a state that decays.
        B: (batch, state, length), what enters the state.
        C: (batch, state, length), how the state is read.
        D: (dim,), the skip connection's weights.
        z: (batch, dim, length), a gate: the output is multiplied by SiLU(z).
        delta_bias: (dim,), added to `delta`.
        delta_softplus: Whether softplus is applied to `delta + delta_bias`.
        return_last_state: Whether the state after the last token is returned as well.

    All tensors are real floating point, on one device, with any strides. The arithmetic is float32, or float64 where
    any input is float64.

    Returns:
        y (batch, dim, length) in the dtype of `u`, and with `return_last_state` the pair of y and the last state
        (batch, dim, state). No gradient flows through the last state, as in `mamba_ssm`.

    Raises:
        ValueError: A shape, or a device, does not fit.
        TypeError: An input is no floating-point tensor.
    """
    _check_inputs(u, delta, A, B, C, D, z, delta_bias)
    tensors = (u, delta, A, B, C, D, delta_bias)
    keep_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # The gate acts on the unrounded output.
    ungated = u if z is None else u.to(_compute_dtype(*tensors, z))
    y, last_state, _ = _scan(ungated, delta, A, B, C, D, delta_bias, delta_softplus, keep_states)
    if z is not None:
        y = (y * F.silu(z.to(y.dtype))).to(u.dtype)
    return (y, last_state.detach()) if return_last_state else y


def _check_inputs(u, delta, A, B, C, D, z, delta_bias):
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"selective_scan needs u of shape (batch, dim, length) and A of shape (dim, state), "
            f"got {tuple(u.shape)} and {tuple(A.shape)}."
        )
    batch, dim, length = u.shape
    state = A.shape[1]
    if 0 in (batch, dim, length, state):
        raise ValueError(f"selective_scan cannot scan nothing: u is {tuple(u.shape)} and A is {tuple(A.shape)}.")
    named = {
        "u": (u, (batch, dim, length)),
        "delta": (delta, (batch, dim, length)),
        "A": (A, (dim, state)),
        "B": (B, (batch, state, length)),
        "C": (C, (batch, state, length)),
        "D": (D, (dim,)),
        "z": (z, (batch, dim, length)),
        "delta_bias": (delta_bias, (dim,)),
    }
    for name, (tensor, shape) in named.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan needs {name} of shape {shape} for u of shape {tuple(u.shape)} and A of shape "
                f"{tuple(A.shape)}, got {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise TypeError(f"selective_scan needs real floating-point tensors, got {name} in {tensor.dtype}.")
        if tensor.device != u.device:
            raise ValueError(
                f"selective_scan needs its inputs on one device: u is on {u.device}, {name} on {tensor.device}."
            )


def _compute_dtype(*tensors):
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _chunk_count(u, A):
    """Chunks of a sequence, each of at least `state` tokens: the kept states then take no more room than `u`."""
    (batch, dim, length), state = u.shape, A.shape[1]
    room = _CHUNK_BYTES["cpu" if u.device.type == "cpu" else "gpu"]
    tokens = torch.sym_max(state, room // (4 * batch * dim * state))
    return (length + tokens - 1) // tokens


# ---------------------------------------------------------------------------------------- the operator
@torch.library.custom_op("mfuser::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and, for backward, the state that enters each chunk (none unless `keep_states`)."""
    with torch.autocast(u.device.type, enabled=False):
        return _chunked_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states)


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    batch, dim, state = u.shape[0], *A.shape
    dtype = _compute_dtype(u, delta, A, B, C, D, delta_bias)
    return (
        torch.empty_like(u),
        u.new_empty(batch, state, dim, dtype=dtype).transpose(1, 2),
        u.new_empty(_chunk_count(u, A) if keep_states else 0, batch, state, dim, dtype=dtype),
    )


@torch.library.custom_op("mfuser::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias; those of an absent D or delta_bias are empty."""
    with torch.autocast(u.device.type, enabled=False):
        return _chunked_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states)


@_scan_backward.register_fake
def _(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in (u, delta, A, B, C, D, delta_bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, grad_y, grad_last_state, grad_states):
    *tensors, states = ctx.saved_tensors
    if len(states) == 0:  # the graph was captured without gradients
        states = _scan(*tensors, ctx.delta_softplus, True)[2]
    *grads, grad_D, grad_bias = _scan_backward(grad_y, *tensors, ctx.delta_softplus, states)
    D, delta_bias = tensors[-2:]
    return *grads, None if D is None else grad_D, None if delta_bias is None else grad_bias, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------- plain torch, by chunks
# The token comes first and the channel last in all that follows: (token, batch, dim) and (token, batch, state, dim).
def _token_major(x, dtype):
    """(batch, channels, length) to contiguous (length, batch, channels)."""
    return x.permute(2, 0, 1).to(dtype).contiguous()


def _matvec(rows, matrices, out):
    """Row vectors (token, batch, k) times matrices (token, batch, k, m).

    The other order, matrix times column vector, is several times slower on a CPU.
    """
    torch.bmm(rows.flatten(0, 1).unsqueeze(1), matrices.flatten(0, 1), out=out.flatten(0, 1).unsqueeze(1))


class _StateBuffer:
    """Room for one number a token, batch, state and channel, and the recurrence over it, both ways, in place."""

    def __init__(self, tokens, like):
        self.all = like.new_empty(tokens, *like.shape)
        self.each = self.all.unbind()  # making these views costs as much as the arithmetic on them
        self.sequential = like.device.type == "cpu"

    def recur(self, decay, count, entering):
        """x_t += decay_t x_(t-1) for the first `count` tokens, with x_(-1) = `entering`."""
        if self.sequential:
            _recur(decay.each[:count], self.each[:count], entering)
        else:
            _recur_in_segments(decay.all[:count], self.all[:count], entering)

    def recur_reversed(self, decay, count):
        """x_t += decay_(t+1) x_(t+1) from the token before the last on."""
        last = count - 1
        if self.sequential:
            _recur(decay.each[last:0:-1], self.each[:last][::-1], self.each[last])
        else:
            x = self.all[:last].flip(0)
            _recur_in_segments(decay.all[1:count].flip(0), x, self.each[last])
            self.all[:last] = x.flip(0)


def _recur(decays, values, entering):
    for decay, value in zip(decays, values, strict=True):
        entering = value.addcmul_(decay, entering)


def _recur_in_segments(decay, values, entering):
    """For a GPU, where launches cost more than arithmetic: sqrt(tokens) segments advance side by side, each from zero;
    then each gets, in turn, what the one before it hands on."""
    count = len(values)
    width = math.isqrt(count) + 1
    reach = decay.clone()  # product of the decays since the segment began
    for t in range(1, width):
        here, before = slice(t, None, width), slice(t - 1, count - 1, width)
        values[here].addcmul_(decay[here], values[before])
        reach[here].mul_(reach[before])
    for start in range(0, count, width):
        segment = values[start : start + width]
        segment.addcmul_(reach[start : start + width], entering)
        entering = segment[-1]


class _Chunks:
    """Computes the states of one chunk after the other, in the same buffers.

    On a CPU the first touch of fresh memory costs more than the arithmetic done in it.
    """

    def __init__(self, u, delta, A, B, C, delta_bias, delta_softplus, dtype):
        (batch, dim, self.length), state = u.shape, A.shape[1]
        self.tokens = -(-self.length // _chunk_count(u, A))
        self.starts = range(0, self.length, self.tokens)
        self.inputs = (u.permute(2, 0, 1), delta.permute(2, 0, 1))
        self.delta_bias, self.delta_softplus = delta_bias, delta_softplus
        self.A = A.t().to(dtype).contiguous()
        self.log2_rates = self.A * _LOG2_E  # exp2 is up to twice as fast as exp
        self.B, self.C = _token_major(B, dtype), _token_major(C, dtype)
        self.initial_state = self.A.new_zeros(batch, state, dim)
        self.u, self.step, self.drive = (self.token_buffer() for _ in range(3))
        self.decay, self.h = (self.state_buffer() for _ in range(2))

    def token_buffer(self):
        return self.initial_state.new_empty(self.tokens, *self.initial_state[:, 0].shape)

    def state_buffer(self):
        return _StateBuffer(self.tokens, self.initial_state)

    def compute(self, start, entering):
        """u, step, drive = step * u, decay and h of the chunk that starts at token `start` with state `entering`."""
        tokens = slice(start, min(start + self.tokens, self.length))
        count = tokens.stop - start
        u, step, drive, decay, h = (x[:count] for x in (self.u, self.step, self.drive, self.decay.all, self.h.all))
        u.copy_(self.inputs[0][tokens])
        step.copy_(self.inputs[1][tokens])
        if self.delta_bias is not None:
            step.add_(self.delta_bias)
        if self.delta_softplus:
            torch.ops.aten.softplus.out(step, out=step)
        torch.mul(step.unsqueeze(2), self.log2_rates, out=decay).exp2_()
        torch.mul(step, u, out=drive)
        torch.mul(drive.unsqueeze(2), self.B[tokens].unsqueeze(3), out=h)
        self.h.recur(self.decay, count, entering)
        return tokens, u, step, drive, decay, h


def _chunked_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    dtype = _compute_dtype(u, delta, A, B, C, D, delta_bias)
    chunks = _Chunks(u, delta, A, B, C, delta_bias, delta_softplus, dtype)
    y = torch.empty_like(u)
    y_buffer = chunks.token_buffer()
    state = chunks.initial_state
    states = state.new_empty(len(chunks.starts) if keep_states else 0, *state.shape)
    for index, start in enumerate(chunks.starts):
        if keep_states:
            states[index] = state
        tokens, u_chunk, *_, h = chunks.compute(start, state)
        y_chunk = y_buffer[: len(h)]
        _matvec(chunks.C[tokens], h, out=y_chunk)
        if D is not None:
            y_chunk.addcmul_(u_chunk, D.to(dtype))
        y.permute(2, 0, 1)[tokens] = y_chunk
        state.copy_(h[-1])
    return y, state.transpose(1, 2), states


def _chunked_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    """From the last chunk to the first: states again, then their gradients g_t = C_t dy_t + decay_(t+1) g_(t+1)."""
    chunks = _Chunks(u, delta, A, B, C, delta_bias, delta_softplus, states.dtype)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_A, grad_B, grad_C = torch.zeros_like(chunks.A), torch.empty_like(chunks.B), torch.empty_like(chunks.C)
    grad_D, grad_bias = grad_A.new_zeros(2, u.shape[1])
    buffers = [chunks.token_buffer() for _ in range(3)]
    g_buffer = chunks.state_buffer()
    ones = torch.ones_like(chunks.C[: chunks.tokens])
    handed_on = torch.zeros_like(chunks.initial_state)  # decay_(t+1) g_(t+1) across a chunk's end
    for index, start in reversed(list(enumerate(chunks.starts))):
        entering = states[index]
        tokens, u_chunk, step, drive, decay, h = chunks.compute(start, entering)
        count = len(h)
        dy, grad_u_chunk, grad_step, g = (x[:count] for x in (*buffers, g_buffer.all))
        dy.copy_(grad_y.permute(2, 0, 1)[tokens])
        _matvec(dy, h.transpose(2, 3), out=grad_C[tokens])

        torch.mul(dy.unsqueeze(2), chunks.C[tokens].unsqueeze(3), out=g)
        g[-1].add_(handed_on)
        g_buffer.recur_reversed(chunks.decay, count)
        torch.mul(decay[0], g[0], out=handed_on)

        _matvec(drive, g.transpose(2, 3), out=grad_B[tokens])
        grad_drive = grad_step
        _matvec(chunks.B[tokens], g, out=grad_drive)
        torch.mul(grad_drive, step, out=grad_u_chunk)
        grad_step = grad_drive.mul_(u_chunk)
        if D is not None:
            grad_u_chunk.addcmul_(dy, D.to(g.dtype))
            grad_D += dy.mul_(u_chunk).sum((0, 1))

        g.mul_(decay)  # from here on the gradient of step_t A, g_t decay_t h_(t-1)
        g[1:].mul_(h[:-1])
        g[0].mul_(entering)
        grad_A += torch.mul(g, step.unsqueeze(2), out=h).sum((0, 1))
        _matvec(ones[:count], g.mul_(chunks.A), out=drive)
        grad_step.add_(drive)
        if delta_softplus:
            grad_step.mul_(torch.neg(step, out=drive).expm1_().neg_())  # sigmoid(x) = 1 - exp(-softplus(x))
        if delta_bias is not None:
            grad_bias += grad_step.sum((0, 1))
        grad_u.permute(2, 0, 1)[tokens] = grad_u_chunk
        grad_delta.permute(2, 0, 1)[tokens] = grad_step

    grads = (grad_A.t(), grad_B.permute(1, 2, 0), grad_C.permute(1, 2, 0), grad_D, grad_bias)
    return grad_u, grad_delta, *(_in_form_of(x, grad) for x, grad in zip((A, B, C, D, delta_bias), grads, strict=True))


def _in_form_of(x, grad):
    """`grad` with the dtype and the memory layout of `x`; empty where `x` is None."""
    return grad.new_empty(0) if x is None else torch.empty_like(x).copy_(grad)
