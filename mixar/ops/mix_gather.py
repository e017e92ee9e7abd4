"""DC-Mix and TI-Mix (Eqs. 9 and 12) in one pass, from the encoder's output to the decoder's input."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixar.ops.native import LIBRARY, define

MAX_BITS = 24  # limit of the kernels, and of a tokenizer's bits
TYPES = (torch.float32, torch.bfloat16, torch.float64)


def code_bits(codes: Tensor, bits: int) -> Tensor:
    """The ±1 bits of discrete tokens, least significant first; a dropped token (negative id) gives zeros.

    Args:
        codes: int64 [...].

    Returns:
        float32 [..., bits].
    """
    ones = (codes[..., None] >> torch.arange(bits, device=codes.device)) & 1
    return (2 * ones - 1).float() * (codes >= 0)[..., None]


def mix_gather(
    encoded: Tensor,
    slots: Tensor,
    codes: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    drawn: Tensor | None = None,
    rho: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """The encoder's output at visible positions, the discrete token's embedding at masked ones, plus positions (Eq. 9).

    The embedding is bias + weight · bits, or a row of a table if there is no bias. For a dropped token (negative id)
    all bits are zero, and no row is added. With `drawn`, `rho` and `share` the discrete token is TI-Mix's: from `codes`
    where ρ < λ, from `drawn` elsewhere (Eq. 12).

    Args:
        encoded: [T, D], the encoder's packed output.
        slots: int64 [B, P], the row of `encoded` for each position, negative where masked; each row is used once.
        codes: int64 [B, N], for the last N positions; None with a weight of zero bits puts the bias at masked ones.
        weight: [D, n] with n of at most 24, or a table [K, D].
        bias: [D]; None with a table.
        positions: [P, D], the decoder's position embeddings.
        drawn, rho: int64 and float32 [B, N], the prior's tokens and ρ.
        share: float32 [1], λ; a tensor, so that a compiled step is not compiled again when it changes.

    Returns:
        [B, P, D], of the common type of `encoded` and `positions`.

    Raises:
        RuntimeError: shapes or types do not fit; on the CPU also if a slot or table id does not exist.
    """
    length, width = positions.shape
    columns = (width, weight.shape[1]) if bias is not None else (weight.shape[0], width)
    mixed = [x for x in (drawn, rho) if x is not None]
    # torch.compile accepts only constant messages
    torch._check(slots.shape[1] == length, lambda: "slots [B, P] and positions [P, D] do not fit")
    torch._check(encoded.shape[1] == width, lambda: "encoded [T, D] and positions [P, D] do not fit")
    torch._check(weight.shape == columns, lambda: "weight [D, n], or [K, D] without bias, and positions do not fit")
    torch._check(bias is None or weight.shape[1] <= MAX_BITS, lambda: "weight [D, n] has more than 24 bits")
    torch._check(len(mixed) in (0, 2) and (share is None) == (not mixed), lambda: "drawn, rho and share come together")
    for given in (codes, *mixed):
        fits = given is None or (codes is not None and given.shape == codes.shape and given.shape[1] <= length)
        torch._check(fits, lambda: "codes, drawn and rho [B, N] and positions [P, D] do not fit")
    dtype = torch.promote_types(encoded.dtype, positions.dtype)
    torch._check(dtype in TYPES, lambda: "mix_gather takes float32, bfloat16 and float64")
    if encoded.dtype not in (dtype, torch.bfloat16) or dtype == torch.float64:
        encoded = encoded.to(dtype)
    weight, positions = weight.to(dtype), positions.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.ops.mixar.mix_gather(encoded, slots, codes, drawn, rho, share, weight, bias, positions)


def reference(
    encoded: Tensor,
    slots: Tensor,
    codes: Tensor | None,
    drawn: Tensor | None,
    rho: Tensor | None,
    share: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
) -> Tensor:
    """The operator in plain PyTorch, differentiable. Arguments as in `mix_gather`, with the types of its kernels."""
    ids = _ids(slots, codes, drawn, rho, share)
    with torch.autocast(slots.device.type, enabled=False):
        if bias is not None:
            filling = F.linear(code_bits(ids, weight.shape[1]).to(weight.dtype), weight, bias)
        else:
            filling = F.embedding(ids.clamp_min(0), weight) * (ids >= 0)[..., None]
    rows = _rows(slots, encoded.shape[0])
    mixed = filling.flatten(0, 1).index_copy(0, rows, encoded.to(filling.dtype)).view_as(filling)
    return mixed + positions


def backward_reference(
    grad: Tensor,
    slots: Tensor,
    codes: Tensor | None,
    drawn: Tensor | None,
    rho: Tensor | None,
    share: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the operator's inputs from grad [B, P, D], except that of a table.

    Args:
        tokens, dtype: T and the type of `encoded`.
        bits: n, or -1 with a table.

    Returns:
        of `encoded` [T, D]; of `positions` [P, D]; of `weight` and `bias` together [n + 1, D], with the bias last. The
        latter two are float32, or float64 for a float64 gradient.
    """
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    flat = grad.flatten(0, 1)
    d_encoded = flat[_rows(slots, tokens)].to(dtype)
    d_positions = grad.sum(0, dtype=sums)
    with torch.autocast(slots.device.type, enabled=False):
        signs = code_bits(_ids(slots, codes, drawn, rho, share), max(bits, 0))
        signs = torch.cat([signs, (slots < 0)[..., None]], -1)[..., : bits + 1]
        d_map = (signs.flatten(0, 1).T.to(grad.dtype) @ flat).to(sums)
    return d_encoded, d_positions, d_map


def _ids(slots: Tensor, codes: Tensor | None, drawn: Tensor | None, rho: Tensor | None, share: Tensor | None) -> Tensor:
    """The mixed discrete tokens [B, P], negative at visible positions, dropped tokens and the prefix."""
    if codes is None:
        return torch.full_like(slots, -1)
    if drawn is not None:
        assert rho is not None and share is not None
        codes = torch.where(rho >= share, drawn, codes)
    return F.pad(codes, (slots.shape[1] - codes.shape[1], 0), value=-1).masked_fill(slots >= 0, -1)


def _rows(slots: Tensor, tokens: int) -> Tensor:
    """The index into [B*P] of each of the T encoded tokens: the inverse of slots."""
    return slots.flatten().argsort()[slots.numel() - tokens :]


def _fake(
    encoded: Tensor, slots: Tensor, codes: Tensor | None, drawn: Tensor | None, rho: Tensor | None,
    share: Tensor | None, weight: Tensor, bias: Tensor | None, positions: Tensor,
) -> Tensor:  # fmt: skip
    return positions.new_empty(*slots.shape, positions.shape[1])


def _backward_fake(
    grad: Tensor, slots: Tensor, codes: Tensor | None, drawn: Tensor | None, rho: Tensor | None,
    share: Tensor | None, tokens: int, dtype: torch.dtype, bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, length, width = grad.shape
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    d_encoded = grad.new_empty(tokens, width, dtype=dtype)
    return d_encoded, grad.new_empty(length, width, dtype=sums), grad.new_empty(bits + 1, width, dtype=sums)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    encoded, slots, codes, drawn, rho, share, weight, bias, _ = inputs
    ctx.save_for_backward(slots, codes, drawn, rho, share)
    ctx.tokens, ctx.dtype = encoded.shape[0], encoded.dtype
    ctx.bits, ctx.entries = (-1, weight.shape[0]) if bias is None else (weight.shape[1], 0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_encoded, d_positions, d_map = torch.ops.mixar.mix_gather_backward(
        grad, *ctx.saved_tensors, ctx.tokens, ctx.dtype, ctx.bits
    )
    if ctx.bits >= 0:
        d_weight, d_bias = d_map[:-1].T.contiguous().to(grad.dtype), d_map[-1].to(grad.dtype)
    else:
        # torch's own scatter sorts by id, so that sums have a fixed order; tokens without a row go past the table's end
        ids, outside = _ids(*ctx.saved_tensors), ctx.entries
        ids = torch.where(ids < 0, outside, ids)
        d_weight = torch.ops.aten.embedding_dense_backward(grad, ids, outside + 1, outside, False)[:outside]
        d_bias = None
    return d_encoded, None, None, None, None, None, d_weight, d_bias, d_positions.to(grad.dtype)


define(
    "mix_gather(Tensor encoded, Tensor slots, Tensor? codes, Tensor? drawn, Tensor? rho, Tensor? share, Tensor weight, "
    "Tensor? bias, Tensor positions) -> Tensor",
    reference,
    _fake,
)
define(
    "mix_gather_backward(Tensor grad, Tensor slots, Tensor? codes, Tensor? drawn, Tensor? rho, Tensor? share, "
    "SymInt tokens, ScalarType dtype, SymInt bits) -> (Tensor, Tensor, Tensor)",
    backward_reference,
    _backward_fake,
)
torch.library.register_autograd("mixar::mix_gather", _backward, setup_context=_setup, lib=LIBRARY)
