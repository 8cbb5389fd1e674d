"""The selective scan for exported graphs: plain operators that any runtime has, the same number for any length.

The states of all tokens are in memory at once, (batch, length, state, dim) numbers, and the depth of the graph is
logarithmic in the length.
"""

import torch
import torch.nn.functional as F

__all__ = ["LARGEST_LENGTH", "exported_scan"]

_PAIRINGS, _DOUBLINGS = 5, 11
LARGEST_LENGTH = 2 ** (_PAIRINGS + _DOUBLINGS) - 1


def exported_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype):
    """y in the dtype of `u`, and the last state in `dtype`, the dtype of the computation."""
    length, block = u.shape[2], 2**_PAIRINGS
    torch._check(length <= LARGEST_LENGTH, lambda: f"an exported scan takes at most {LARGEST_LENGTH} tokens")
    step = delta.transpose(1, 2).to(dtype)  # (batch, length, dim)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    drive, B, C = (x.transpose(1, 2).to(dtype) for x in (u, B, C))
    # A step of 0 keeps the state. At least three blocks: a graph would be specialised to a length of 1 or 2.
    padding = (0, 0, 0, (length // block + 3) * block - length)
    step, drive, B, C = (F.pad(x, padding) for x in (step, drive * step, B, C))
    decay = torch.exp(step.unsqueeze(2) * A.t().to(dtype))  # (batch, length, state, dim)
    h = _recurrence_in_pairs(decay, drive.unsqueeze(2) * B.unsqueeze(3), _PAIRINGS)
    y = (C.unsqueeze(2) @ h).squeeze(2)[:, :length].transpose(1, 2)
    if D is not None:
        y = y + u * D[:, None].to(dtype)
    return y.to(u.dtype), h[:, -1].transpose(1, 2)


def _recurrence_in_pairs(decay, x, pairings):
    """h_t = decay_t h_(t-1) + x_t along dimension 1: a pair of tokens is one token of half as long a sequence."""
    if pairings == 0:
        return _recurrence_by_doubling(decay, x)
    (first_decay, second_decay), (first, second) = (each.unflatten(1, (-1, 2)).unbind(2) for each in (decay, x))
    second = _recurrence_in_pairs(first_decay * second_decay, second_decay * first + second, pairings - 1)
    entering = torch.cat([torch.zeros_like(second[:, :1]), second[:, :-1]], dim=1)
    return torch.stack([first_decay * entering + first, second], dim=2).flatten(1, 2)


def _recurrence_by_doubling(decay, x):
    """The same: every token absorbs the one before it, then two before it, and so on. Lengths stay as they are."""
    tokens = torch.arange(x.shape[1], device=x.device)
    for doubling in range(_DOUBLINGS):
        present = (tokens >= 2**doubling).to(x.dtype)[:, None, None]
        earlier = (tokens - 2**doubling).clamp(min=0)
        x = x + decay * present * x.index_select(1, earlier)
        decay = decay * decay.index_select(1, earlier)
    return x
