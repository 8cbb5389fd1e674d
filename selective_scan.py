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

# A chunk's states should stay in a core's cache on a CPU.
_CPU_CHUNK_BYTES = 2 << 20
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


def _chunk_tokens(u, A):
    """Tokens a chunk: at least `state`, so that the states that are kept take no more memory than `u`."""
    batch, (dim, state) = u.shape[0], A.shape
    return torch.sym_max(state, _CPU_CHUNK_BYTES // (4 * batch * dim * state))


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
    (batch, dim, length), state = u.shape, A.shape[1]
    dtype = _compute_dtype(u, delta, A, B, C, D, delta_bias)
    tokens = _chunk_tokens(u, A)
    chunks = (length + tokens - 1) // tokens if keep_states else 0
    return (
        u.new_empty(batch, length, dim).transpose(1, 2),
        u.new_empty(batch, state, dim, dtype=dtype).transpose(1, 2),
        u.new_empty(chunks, batch, state, dim, dtype=dtype),
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
    def token_major(like):
        batch, channels, length = like.shape
        return like.new_empty(batch, length, channels).transpose(1, 2)

    return (
        token_major(u),
        token_major(delta),
        A.new_empty(A.shape[::-1]).t(),
        token_major(B),
        token_major(C),
        u.new_empty(0) if D is None else D.new_empty(D.shape),
        u.new_empty(0) if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


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
class _Chunks:
    """Recomputes the states of one chunk at a time, in buffers that every chunk reuses.

    On a CPU the first touch of fresh memory costs more than the arithmetic done in it. The token comes first and the
    channel last in all buffers: `u`, `step` and `drive` = step * u are (token, batch, dim), `decay` and the states `h`
    are (token, batch, state, dim).
    """

    def __init__(self, u, delta, A, B, delta_bias, delta_softplus, dtype):
        batch, dim, self.length = u.shape
        self.inputs = (u.permute(2, 0, 1), delta.permute(2, 0, 1))
        self.delta_bias, self.delta_softplus, self.dtype = delta_bias, delta_softplus, dtype
        self.A = A.t().to(dtype).contiguous()
        self.log2_rates = self.A * _LOG2_E  # exp2 is up to twice as fast as exp
        self.B = _token_major(B, dtype)
        self.tokens = min(self.length, _chunk_tokens(u, A))
        self.buffers = [self.new_buffer() for _ in range(3)] + [self.new_buffer(A.shape[1]) for _ in range(2)]

    def new_buffer(self, *channels):
        batch, dim = self.inputs[0].shape[1:]
        return self.A.new_empty(self.tokens, batch, *channels, dim)

    def starts(self):
        return range(0, self.length, self.tokens)

    def compute(self, start, entering):
        """u, step, drive, decay and h of the chunk from token `start` on, which the state `entering` enters."""
        tokens = slice(start, start + self.tokens)
        count = len(range(self.length)[tokens])
        u, step, drive, decay, h = (buffer[:count] for buffer in self.buffers)
        u.copy_(self.inputs[0][tokens])
        step.copy_(self.inputs[1][tokens])
        if self.delta_bias is not None:
            step.add_(self.delta_bias)
        if self.delta_softplus:
            torch.ops.aten.softplus.out(step, out=step)
        torch.mul(step.unsqueeze(2), self.log2_rates, out=decay).exp2_()
        torch.mul(step, u, out=drive)
        torch.mul(drive.unsqueeze(2), self.B[tokens].unsqueeze(3), out=h)
        for decay_t, h_t in zip(decay.unbind(), h.unbind(), strict=True):
            entering = h_t.addcmul_(decay_t, entering)
        return u, step, drive, decay, h


def _token_major(x, dtype):
    """(batch, channels, length) to contiguous (length, batch, channels)."""
    return x.permute(2, 0, 1).to(dtype).contiguous()


def _matvec(rows, matrices, out):
    """<row, matrix> over the last axis of rows (token, batch, k) and the first of matrices (token, batch, k, m)."""
    # Row vector times matrix: the product with a column vector is several times slower.
    torch.bmm(rows.flatten(0, 1).unsqueeze(1), matrices.flatten(0, 1), out=out.flatten(0, 1).unsqueeze(1))


def _chunked_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    batch, dim, length = u.shape
    dtype = _compute_dtype(u, delta, A, B, C, D, delta_bias)
    chunks = _Chunks(u, delta, A, B, delta_bias, delta_softplus, dtype)
    C = _token_major(C, dtype)
    y = u.new_empty(batch, length, dim)
    y_buffer = chunks.new_buffer()
    state = torch.zeros_like(chunks.A).repeat(batch, 1, 1)
    states = state.new_empty(len(chunks.starts()) if keep_states else 0, *state.shape)
    for index, start in enumerate(chunks.starts()):
        if keep_states:
            states[index] = state
        u_chunk, _, _, _, h = chunks.compute(start, state)
        tokens = slice(start, start + len(h))
        y_chunk = y_buffer[: len(h)]
        _matvec(C[tokens], h, out=y_chunk)
        if D is not None:
            y_chunk.addcmul_(u_chunk, D.to(dtype))
        y[:, tokens] = y_chunk.transpose(0, 1)
        state.copy_(h[-1])
    return y.transpose(1, 2), state.transpose(1, 2), states


def _chunked_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    """Chunks from last to first: the states again, then their gradients g_t = C_t dy_t + decay_(t+1) g_(t+1)."""
    batch, dim, length = u.shape
    dtype = states.dtype
    chunks = _Chunks(u, delta, A, B, delta_bias, delta_softplus, dtype)
    C = _token_major(C, dtype)
    grad_u, grad_delta = u.new_empty(batch, length, dim), delta.new_empty(batch, length, dim)
    grad_B, grad_C = torch.empty_like(chunks.B), torch.empty_like(C)
    grad_A = torch.zeros_like(chunks.A)
    grad_D, grad_bias = grad_A.new_zeros(dim), grad_A.new_zeros(dim)
    dy_buffer, gu_buffer, gd_buffer = (chunks.new_buffer() for _ in range(3))
    g_buffer = chunks.new_buffer(A.shape[1])
    from_right = torch.zeros_like(states[0])
    ones = C.new_ones(1).expand(chunks.tokens, batch, A.shape[1])
    for index, start in reversed(list(enumerate(chunks.starts()))):
        entering = states[index]
        u_chunk, step, drive, decay, h = chunks.compute(start, entering)
        tokens = slice(start, start + len(h))
        dy, gu, gd, g = (buffer[: len(h)] for buffer in (dy_buffer, gu_buffer, gd_buffer, g_buffer))
        dy.copy_(grad_y.permute(2, 0, 1)[tokens])
        _matvec(dy, h.transpose(2, 3), out=grad_C[tokens])

        torch.mul(dy.unsqueeze(2), C[tokens].unsqueeze(3), out=g)
        decays, gs = decay.unbind(), g.unbind()
        right = gs[-1].add_(from_right)
        for t in range(len(gs) - 2, -1, -1):
            right = gs[t].addcmul_(decays[t + 1], right)
        torch.mul(decays[0], right, out=from_right)

        _matvec(drive, g.transpose(2, 3), out=grad_B[tokens])
        _matvec(chunks.B[tokens], g, out=gd)  # the gradient of the drive
        torch.mul(gd, step, out=gu)
        gd.mul_(u_chunk)
        if D is not None:
            gu.addcmul_(dy, D.to(dtype))
            grad_D += dy.mul_(u_chunk).sum((0, 1))
        # g becomes the gradient of step * A: g_t * decay_t * h_(t-1)
        g.mul_(decay)
        g[1:].mul_(h[:-1])
        g[0].mul_(entering)
        grad_A += torch.mul(g, step.unsqueeze(2), out=h).sum((0, 1))
        _matvec(ones[: len(h)], g.mul_(chunks.A), out=drive)
        gd.add_(drive)
        if delta_softplus:
            gd.mul_(torch.neg(step, out=drive).expm1_().neg_())  # sigmoid(x) = 1 - exp(-softplus(x))
        if delta_bias is not None:
            grad_bias += gd.sum((0, 1))
        grad_u[:, tokens] = gu.transpose(0, 1)
        grad_delta[:, tokens] = gd.transpose(0, 1)

    return (
        grad_u.transpose(1, 2),
        grad_delta.transpose(1, 2),
        grad_A.t().to(A.dtype),
        grad_B.permute(1, 2, 0).to(B.dtype),
        grad_C.permute(1, 2, 0).to(C.dtype),
        grad_D.new_empty(0) if D is None else grad_D.to(D.dtype),
        grad_D.new_empty(0) if delta_bias is None else grad_bias.to(delta_bias.dtype),
    )
