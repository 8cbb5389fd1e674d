"""The selective scan of Mamba (arXiv 2312.00752), differentiable, on any device.

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t        y_t = <C_t, h_t> + D u_t

for every channel independently, where h_t holds `state` numbers per channel. The states of a sequence are (batch, dim,
length, state) numbers in total, and a plain implementation is slow because it moves all of them through memory. Here a
sequence is split into chunks: the initial state of each chunk is kept, all other states are held in a small buffer and
recomputed in the backward pass, so that memory is O(batch * dim * length).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .selective_scan_export import exported_scan

try:
    # The compiled extension is imported first: without it, the package can be imported but fails when it is called.
    import selective_scan_cuda  # noqa: F401
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as mamba_ssm_scan
except ImportError:
    mamba_ssm_scan = None

try:
    from transformers.integrations.hub_kernels import get_kernel
except ImportError:
    get_kernel = None

try:
    from .selective_scan_triton import TRITON_CHUNK_TOKENS, triton_scan, triton_scan_backward
except ImportError:
    triton_scan = None  # type: ignore[assignment]  # mypy expects the function

__all__ = ["selective_scan", "use_hub_kernel"]

# Largest memory for the states of a chunk: on a CPU they should fit into the cache, on a GPU chunks should be large.
# 2.25 MiB are 72 tokens of 512 channels of 16 states: torch uses several threads above 32768 = 64 * 512 numbers.
_CPU_CHUNK_BYTES = 9 << 18
_GPU_CHUNK_BYTES = 1 << 27
_LOG2_E = 1 / math.log(2)
_VERSION = 1  # of the operators, which are global: copies of this file share those of the same version


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
    """
    Scans a sequence with input-dependent steps; signature and meaning are those of `mamba_ssm`.

    On CUDA the kernel of mamba_ssm runs where its compiled extension is installed or [`use_hub_kernel`] loaded it,
    otherwise a Triton kernel; plain torch runs everywhere else. When compiled, the scan is one operator, with any of
    these kernels but mamba_ssm's. When exported, it is plain operators, see selective_scan_export.py.

    The inputs are real floating point, on one device, with any strides. The arithmetic is float32, under autocast too,
    or float64 if an input is float64.

    Args:
        u (`torch.Tensor` of shape `(batch, dim, length)`):
            The input.
        delta (`torch.Tensor` of shape `(batch, dim, length)`):
            The step sizes, before `delta_bias` and softplus.
        A (`torch.Tensor` of shape `(dim, state)`):
            The rates; negative for a state that decays.
        B (`torch.Tensor` of shape `(batch, state, length)`):
            The weights of the input in the state.
        C (`torch.Tensor` of shape `(batch, state, length)`):
            The weights of the state in the output.
        D (`torch.Tensor` of shape `(dim,)`, *optional*):
            The weight of the input in the output.
        z (`torch.Tensor` of shape `(batch, dim, length)`, *optional*):
            A gate: the output is multiplied by SiLU(z).
        delta_bias (`torch.Tensor` of shape `(dim,)`, *optional*):
            Added to `delta`.
        delta_softplus (`bool`, *optional*, defaults to `False`):
            Whether softplus is applied to `delta + delta_bias`.
        return_last_state (`bool`, *optional*, defaults to `False`):
            Whether the state after the last token is returned as well.

    Returns:
        `torch.Tensor` of shape `(batch, dim, length)` in the dtype of `u`; with `return_last_state` a tuple of it and
        the last state `(batch, dim, state)`. As in `mamba_ssm`, no gradient flows through the last state. The gradient
        of the output cannot be differentiated again.

    Raises:
        ValueError: If a shape or a device does not fit.
        TypeError: If an input is not real floating point.
    """
    _check_inputs(u, delta, A, B, C, D, z, delta_bias)
    tensors = (u, delta, A, B, C, D, delta_bias)
    if _uses_mamba_ssm(u, A, _compute_dtype(*tensors, z)):
        y, last_state = _scan_by_mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        # The gate acts on the output before that is rounded to the dtype of u.
        u_in = u if z is None else u.to(_compute_dtype(*tensors, z))
        if torch.compiler.is_exporting():
            y, last_state = exported_scan(u_in, *tensors[1:], delta_softplus, _compute_dtype(*tensors, z))
        else:
            keep_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            y, last_state, _ = _scan(u_in, delta, A, B, C, D, delta_bias, delta_softplus, keep_states)
        if z is not None:
            y = (y * F.silu(z.to(y.dtype))).to(u.dtype)
    return (y, last_state.detach()) if return_last_state else y


def use_hub_kernel(repository: str = "kernels-community/mamba-ssm", version: int = 4):
    """
    Loads mamba_ssm's prebuilt kernel from the Hub, for CUDA machines without mamba_ssm and without a compiler.

    It needs the package `kernels` and, the first time, the network; hence it is not loaded by default.

    Raises:
        ImportError: If `kernels` is not installed.
    """
    global mamba_ssm_scan
    if get_kernel is None:
        raise ImportError("this version of transformers cannot load kernels from the Hub; install mamba_ssm instead")
    mamba_ssm_scan = get_kernel(repository, version=version).selective_scan_fn


def _check_inputs(u, delta, A, B, C, D, z, delta_bias):
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            "selective_scan needs u of shape (batch, dim, length) and A of shape (dim, state), "
            f"got {tuple(u.shape)} and {tuple(A.shape)}."
        )
    batch, dim, length = u.shape
    state = A.shape[1]
    if 0 in (batch, dim, length, state):
        raise ValueError(f"selective_scan has nothing to scan: u is {tuple(u.shape)} and A is {tuple(A.shape)}.")
    needed = {
        "u": (u, (batch, dim, length)),
        "delta": (delta, (batch, dim, length)),
        "A": (A, (dim, state)),
        "B": (B, (batch, state, length)),
        "C": (C, (batch, state, length)),
        "D": (D, (dim,)),
        "z": (z, (batch, dim, length)),
        "delta_bias": (delta_bias, (dim,)),
    }
    for name, (tensor, shape) in needed.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan needs {name} of shape {shape}, as u is {tuple(u.shape)} and A is {tuple(A.shape)}, "
                f"got {tuple(tensor.shape)}."
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


def _uses_mamba_ssm(u, A, dtype):
    fits = u.is_cuda and dtype == torch.float32 and A.shape[1] <= 256
    return mamba_ssm_scan is not None and fits and not torch.compiler.is_compiling()


def _scan_by_mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """Casts the inputs for mamba_ssm's kernel: one dtype for those along the sequence, float32 for the parameters."""
    dtypes = {x.dtype for x in (u, delta, B, C, z) if x is not None}
    dtype = u.dtype if len(dtypes) == 1 else torch.float32
    delta, B, C, z = (None if x is None else x.to(dtype) for x in (delta, B, C, z))
    A, D, delta_bias = (None if x is None else x.float() for x in (A, D, delta_bias))
    y, last_state = mamba_ssm_scan(
        u.to(dtype), delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=True
    )
    return y.to(u.dtype), last_state


# ------------------------------------------------------------------------------------------------ the operator
def _implementation(u, dtype):
    """Forward, backward, and the number of tokens per chunk, or None if it depends on the sizes."""
    if triton_scan is not None and u.is_cuda and dtype == torch.float32:
        return triton_scan, triton_scan_backward, TRITON_CHUNK_TOKENS
    return _torch_scan, _torch_scan_backward, None


def _chunk_count(u, A, dtype):
    (batch, dim, length), state = u.shape, A.shape[1]
    *_, tokens = _implementation(u, dtype)
    if tokens is None:
        # At least `state` tokens: the states that are kept then take no more memory than `u`.
        room = _CPU_CHUNK_BYTES if u.device.type == "cpu" else _GPU_CHUNK_BYTES
        tokens = torch.sym_max(state, room // (4 * batch * dim * state))
    return (length + tokens - 1) // tokens


def _run_scan(
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
    """y, the last state and, if they are to be kept, the initial states of the chunks (chunk, batch, state, dim).

    These are flattened: by their shape, a captured graph would be specialised to one chunk, or to several.
    """
    forward, *_ = _implementation(u, _compute_dtype(u, delta, A, B, C, D, delta_bias))
    y, last_state, states = forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states)
    return y, last_state, states.flatten()


def _scan_shapes(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    (batch, dim, _), state = u.shape, A.shape[1]
    dtype = _compute_dtype(u, delta, A, B, C, D, delta_bias)
    return (
        _new_like(u),
        u.new_empty(batch, state, dim, dtype=dtype).transpose(1, 2),
        u.new_empty(_chunk_count(u, A, dtype) * batch * state * dim if keep_states else 0, dtype=dtype),
    )


def _run_scan_backward(
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
    """Gradients of u, delta, A, B, C, D and delta_bias; an absent D or delta_bias gets an empty one."""
    _, backward, _ = _implementation(u, states.dtype)
    states = states.view(-1, u.shape[0], *A.t().shape)
    grads = backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states)
    pairs = zip((u, delta, A, B, C, D, delta_bias), grads, strict=True)
    results = [u.new_empty(0) if x is None else grad.to(x.dtype) for x, grad in pairs]
    return tuple(results)  # type: ignore[return-value]  # there are seven


def _scan_backward_shapes(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    vectors = (u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (D, delta_bias))
    return _new_like(u), _new_like(delta), A.new_empty(A.shape[::-1]).t(), _new_like(B), _new_like(C), *vectors


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, grad_y, grad_last_state, grad_states):
    *tensors, states = ctx.saved_tensors
    if len(states) == 0:  # the graph was captured without gradients
        states = _scan(*tensors, ctx.delta_softplus, True)[2]
    grads = _scan_backward(grad_y, *tensors, ctx.delta_softplus, states)
    return *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), None, None


def _operators():
    """The operators of the scan and its backward, registered by the first copy of this file."""
    names = [f"selective_scan_v{_VERSION}", f"selective_scan_backward_v{_VERSION}"]
    if not hasattr(torch.ops.mfuser, names[0]):
        scan = torch.library.custom_op(f"mfuser::{names[0]}", _run_scan, mutates_args=())
        backward = torch.library.custom_op(f"mfuser::{names[1]}", _run_scan_backward, mutates_args=())
        scan.register_fake(_scan_shapes)
        backward.register_fake(_scan_backward_shapes)
        scan.register_autograd(_backward, setup_context=_setup_context)
    return [getattr(torch.ops.mfuser, name).default for name in names]


_scan, _scan_backward = _operators()


def _new_like(x):
    """An empty tensor (batch, channels, length) with channels last in memory, the format of the model's layers."""
    batch, channels, length = x.shape
    return x.new_empty(batch, length, channels).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ plain torch
# The token comes first and the channel last in all that follows: (token, batch, dim), (token, batch, state, dim).
class _Chunks:
    """Computes the states of one chunk after the other, always in the same buffers.

    On a CPU, the first access to newly allocated memory takes longer than the computation in it.
    """

    def __init__(self, u, delta, A, B, C, delta_bias, delta_softplus, dtype):
        (batch, dim, self.length), state = u.shape, A.shape[1]
        self.tokens = -(-self.length // _chunk_count(u, A, dtype))
        self.starts = range(0, self.length, self.tokens)
        self.inputs = (u.permute(2, 0, 1), delta.permute(2, 0, 1))
        self.delta_bias, self.delta_softplus = delta_bias, delta_softplus
        self.A = A.t().to(dtype).contiguous()
        self.log2_rates = self.A * _LOG2_E  # exp2 is up to twice as fast as exp
        self.B, self.C = (x.permute(2, 0, 1).to(dtype).contiguous() for x in (B, C))
        self.initial_state = self.A.new_zeros(batch, state, dim)
        self.u, self.step, self.drive = (self.token_buffer() for _ in range(3))
        self.decay, self.h = (self.state_buffer() for _ in range(2))

    def token_buffer(self):
        batch, _, dim = self.initial_state.shape
        return self.A.new_empty(self.tokens, batch, dim)

    def state_buffer(self):
        return _StateBuffer(self.tokens, self.initial_state)

    def compute(self, start, entering):
        """u, step, drive = step * u, decay and h of the chunk that begins at token `start` with state `entering`."""
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


class _StateBuffer:
    """A buffer for the states of a chunk, or their gradients, and in-place recurrences over it in both directions."""

    def __init__(self, tokens, state):
        self.all = state.new_empty(tokens, *state.shape)
        # Creating these views takes as long as the computation on them, so they are created once.
        self.each = self.all.unbind() if state.device.type == "cpu" else None

    def recur(self, decay, count, entering):
        """x_t += decay_t x_(t-1) for `count` tokens, with x_(-1) = `entering`."""
        if self.each is None:
            _recur_in_pairs(decay.all[:count], self.all[:count], entering)
        else:
            _recur_one_by_one(decay.each[:count], self.each[:count], entering)

    def recur_reversed(self, decay, count):
        """x_t += decay_(t+1) x_(t+1) for the tokens before the last of `count`."""
        last = count - 1
        if self.each is None:
            x = self.all[:last].flip(0)
            _recur_in_pairs(decay.all[1:count].flip(0), x, self.all[last])
            self.all[:last] = x.flip(0)
        else:
            _recur_one_by_one(decay.each[last:0:-1], self.each[:last][::-1], self.each[last])


def _recur_one_by_one(decays, xs, entering):
    for decay, x in zip(decays, xs, strict=True):
        entering = x.addcmul_(decay, entering)


def _recur_in_pairs(decay, x, entering):
    """For a GPU, where a launch takes longer than its computation: 4 log2(tokens) launches, not one per token.

    Every second token absorbs the one before it; what remains is the same recurrence over half as many tokens.
    """
    if len(x) == 0:
        return
    first, second = x[::2], x[1::2]
    decay_first, decay_second = decay[::2], decay[1::2]
    pairs = len(second)
    second.addcmul_(decay_second, first[:pairs])
    _recur_in_pairs(decay_second * decay_first[:pairs], second, entering)
    first[0].addcmul_(decay_first[0], entering)
    first[1:].addcmul_(decay_first[1:], second[: len(first) - 1])


def _matvec(rows, matrices, out):
    """Row vectors (token, batch, k) times matrices (token, batch, k, m).

    The other order, matrix times column vector, is several times slower on a CPU. Autocast leaves `out=` alone.
    """
    torch.bmm(rows.flatten(0, 1).unsqueeze(1), matrices.flatten(0, 1), out=out.flatten(0, 1).unsqueeze(1))
    return out


def _torch_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    dtype = _compute_dtype(u, delta, A, B, C, D, delta_bias)
    chunks = _Chunks(u, delta, A, B, C, delta_bias, delta_softplus, dtype)
    state = chunks.initial_state
    states = state.new_empty(len(chunks.starts) if keep_states else 0, *state.shape)
    y, y_buffer = _new_like(u), chunks.token_buffer()
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


def _torch_scan_backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, states):
    """From the last chunk to the first: states again, then their gradients g_t = C_t dy_t + decay_(t+1) g_(t+1)."""
    chunks = _Chunks(u, delta, A, B, C, delta_bias, delta_softplus, states.dtype)
    grad_u, grad_delta, grad_B, grad_C = (_new_like(x) for x in (u, delta, B, C))
    grad_A = torch.zeros_like(chunks.A)
    grad_D, grad_bias = grad_A.new_zeros(u.shape[1]), grad_A.new_zeros(u.shape[1])
    dy_buffer, grad_u_buffer, grad_step_buffer = (chunks.token_buffer() for _ in range(3))
    g_buffer = chunks.state_buffer()
    ones = torch.ones_like(chunks.B[: chunks.tokens])
    grad_BC_buffer = torch.empty_like(ones)
    from_right = torch.zeros_like(chunks.initial_state)  # decay_(t+1) g_(t+1) across the end of a chunk
    for index, start in reversed(list(enumerate(chunks.starts))):
        entering = states[index]
        tokens, u_chunk, step, drive, decay, h = chunks.compute(start, entering)
        count = len(h)
        dy, grad_u_chunk, grad_step, g, grad_BC = (
            x[:count] for x in (dy_buffer, grad_u_buffer, grad_step_buffer, g_buffer.all, grad_BC_buffer)
        )
        dy.copy_(grad_y.permute(2, 0, 1)[tokens])
        _matvec(dy, h.transpose(2, 3), out=grad_BC)
        grad_C.permute(2, 0, 1)[tokens] = grad_BC

        torch.mul(dy.unsqueeze(2), chunks.C[tokens].unsqueeze(3), out=g)
        g[-1].add_(from_right)
        g_buffer.recur_reversed(chunks.decay, count)
        torch.mul(decay[0], g[0], out=from_right)

        _matvec(drive, g.transpose(2, 3), out=grad_BC)
        grad_B.permute(2, 0, 1)[tokens] = grad_BC
        _matvec(chunks.B[tokens], g, out=grad_step)  # of the drive, so far
        torch.mul(grad_step, step, out=grad_u_chunk)
        grad_step.mul_(u_chunk)
        if D is not None:
            grad_u_chunk.addcmul_(dy, D.to(dy.dtype))
            grad_D += dy.mul_(u_chunk).sum((0, 1))
        grad_u.permute(2, 0, 1)[tokens] = grad_u_chunk

        g.mul_(decay)[1:].mul_(h[:-1])  # of step_t A from here on: g_t decay_t h_(t-1)
        g[0].mul_(entering)
        grad_A += torch.mul(g, step.unsqueeze(2), out=h).sum((0, 1))
        grad_step.add_(_matvec(ones[:count], g.mul_(chunks.A), out=drive))
        if delta_softplus:
            grad_step.mul_(step.neg_().expm1_().neg_())  # sigmoid(x) = 1 - exp(-softplus(x))
        if delta_bias is not None:
            grad_bias += grad_step.sum((0, 1))
        grad_delta.permute(2, 0, 1)[tokens] = grad_step

    return grad_u, grad_delta, grad_A.t(), grad_B, grad_C, grad_D, grad_bias
