"""The diffusion head: an MLP with adaptive layer norms that denoises one token under one condition (MAR)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar.config import STEPS
from mixar.model.rows import Linear, flat, grouped
from mixar.ops import gated_add, in_one, norm_modulate, timestep_embed

EPS = 1e-6  # of the head's layer norms


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in a form that does not keep 1 + scale for the backward pass."""
    return x * scale + x + shift


class ModulatedNorm(nn.LayerNorm):
    """modulate(norm(x)): where a gradient is needed composed, which torch.compile fuses; else one operator."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """x, shift, scale [R, w]: [R, w], of `dtype` if it is the operator's."""
        learns = torch.is_grad_enabled() and any(v.requires_grad for v in (x, shift, scale, *self.parameters()))
        fused = x.device.type == "cpu" and torch.compiler.is_compiling()  # whose loop is faster than a call
        if learns or fused or not in_one(x.device.type):
            return modulate(super().forward(x), shift, scale)
        return norm_modulate(x, self.weight, self.bias, shift, scale, self.eps, dtype)


def linear_dtype(device: str, otherwise: torch.dtype) -> torch.dtype:
    """The type in which a linear layer computes on a device type: autocast's, or without it the given one."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else otherwise


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a timestep through a two-layer MLP."""

    features = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t [R] on the scale of the 1000 training steps: [R, w]."""
        dtype = linear_dtype(t.device.type, next(self.mlp.parameters()).dtype)
        return self.mlp(timestep_embed(t, self.features, dtype=dtype))


class Embedded(NamedTuple):
    """The modulation's input for R = mul · R' rows, after its SiLU.

    Attributes:
        rows: [R, w], the sum of time and condition; with a separable modulation [R', w], the condition of each token.
        times: [K, w], the K embedded timesteps, with a separable modulation only.
        row_times: int64 [R], each row's index into `times`; None if there is one time for all.
    """

    rows: Tensor
    times: Tensor | None = None
    row_times: Tensor | None = None


class Modulation(nn.ModuleDict):
    """`parts` vectors per row, from time and condition. The linear map is named `1`, as in the public weights.

    The joint one maps SiLU(time + condition) of each row. The separable one adds a map of SiLU(time), computed once per
    timestep, and a map of SiLU(condition), computed once per token.
    """

    def __init__(self, width: int, parts: int, separable: bool) -> None:
        super().__init__({"1": Linear(width, parts * width)})
        if separable:
            self["time"] = nn.Linear(width, parts * width, bias=False)
        self.parts = parts

    def forward(self, y: Embedded) -> tuple[Tensor, ...]:
        values = self["1"](y.rows)
        if y.times is not None:
            values = grouped(_at_times(self["time"](y.times), values, y.row_times))
        return values.chunk(self.parts, -1)


class ResBlock(nn.Module):
    """x += gate * mlp(modulate(norm(x)))."""

    def __init__(self, width: int, separable: bool) -> None:
        super().__init__()
        self.in_ln = ModulatedNorm(width, eps=EPS)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3, separable)

    def forward(self, x: Tensor, y: Embedded) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y)
        return gated_add(x, gate, self.mlp(self.in_ln(x, shift, scale, linear_dtype(x.device.type, x.dtype))))


class FinalLayer(nn.Module):
    """A modulated layer norm without parameters, then a linear map."""

    def __init__(self, width: int, out: int, separable: bool) -> None:
        super().__init__()
        self.norm = ModulatedNorm(width, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = Modulation(width, 2, separable)

    def forward(self, x: Tensor, y: Embedded) -> Tensor:
        shift, scale = self.adaLN_modulation(y)
        x = self.norm(x, shift, scale, torch.float32)
        # in float32 also under autocast: near t = 999 sampling multiplies the rounding error of ε by 2e4
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x.float())


class Head(nn.Module):
    """The network that denoises a token: the process's prediction, and the variance fraction.

    Args:
        token_dim: C.
        condition: D, the width of the backbone's output.
        depth: number of residual blocks.
        width: their width w.
        separable: modulate by time and by condition separately.
        learn_variance: also predict the variance fraction; see `Process.learns_variance`.
    """

    def __init__(
        self, token_dim: int, condition: int, depth: int, width: int, separable: bool = False,
        learn_variance: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.separable, self.token_dim = separable, token_dim
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width, separable) for _ in range(depth))
        self.final_layer = FinalLayer(width, (1 + learn_variance) * token_dim, separable)

    def embed(self, times: Tensor, conditions: Tensor, index: Tensor | None = None) -> Embedded:
        """The modulation's input for R rows, from embedded times [K, w] and conditions [R / mul, w].

        Args:
            index: int64 [R], each row's index into the times; None if there is one time for all.
        """
        if self.separable:
            return Embedded(F.silu(conditions), F.silu(times), index)
        return Embedded(grouped(F.silu(_at_times(times, conditions, index))))

    def denoise(self, x: Tensor, y: Embedded) -> tuple[Tensor, Tensor | None]:
        """The network after its embeddings: x [R, C] to the outputs of `forward`."""
        x = self.input_proj(grouped(x))
        for block in self.res_blocks:
            x = block(x, y)
        prediction, *v = flat(self.final_layer(x, y)).split(self.token_dim, -1)
        return prediction, v[0] if v else None

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The process's prediction, ε or a velocity, and the variance fraction v; float32 [R, C] each.

        Args:
            x: [R, C], the R / mul tokens repeated mul times.
            t: [R], int64 in 0..999, or float32 in [0, 1000].
            z: [R / mul, D], their conditions.
        """
        if len(t) > STEPS and not t.is_floating_point():  # embeds each timestep once, not per row
            times, index = torch.arange(STEPS, device=t.device), t
        else:
            times, index = t, torch.arange(len(t), device=t.device)
        return self.denoise(x, self.embed(self.time_embed(times), self.cond_embed(z), index))


def _at_times(by_time: Tensor, by_token: Tensor, index: Tensor | None) -> Tensor:
    """Sums of a vector per time [K, w] and one per token [R / mul, w]: [R, w]; `index` as in `Head.embed`."""
    if index is None:
        return by_time + by_token
    return (gather(by_time, index).unflatten(0, (-1, len(by_token))) + by_token).flatten(0, 1)


def gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, in float32, since the gradients of many rows are summed in one row of the table."""
    return F.embedding(index, table.float()).to(table.dtype)
