"""The diffusion head: an MLP with adaptive layer norms that denoises one token under one condition (MAR)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar.ops import timestep_embed

EPS = 1e-6  # of the head's layer norms


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a timestep through a two-layer MLP."""

    features = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t [R] on the scale of the 1000 training steps: [R, w]."""
        kind = t.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else next(self.mlp.parameters()).dtype
        return self.mlp(timestep_embed(t, self.features, dtype=dtype))


class ResBlock(nn.Module):
    """x += gate * mlp(modulate(norm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """Modulated norm without parameters of its own, then a linear map."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        x = modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale)
        # in float32 under autocast too: near t = 999 sampling multiplies ε's rounding by 2e4
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x.float())


class Head(nn.Module):
    """ε and variance fraction of a noisy token.

    Args:
        token_dim: C.
        condition: D, the width of the backbone's output.
        depth: residual blocks.
        width: their width w.
    """

    def __init__(self, token_dim: int, condition: int, depth: int, width: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)

    def denoise(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The network after its embeddings: x [R, C], y = time + condition [R, w] to ε and v, float32 [R, C] each."""
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        eps, v = self.final_layer(x, y).chunk(2, -1)
        return eps, v

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x [R, C], t [R] in 0..999, z [R, D] to ε and the variance fraction v, float32 [R, C] each."""
        return self.denoise(x, self.time_embed(t) + self.cond_embed(z))
