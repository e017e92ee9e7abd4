"""A plain implementation of MAR's algorithm, with the habits of its public code, as the reference of benchmarks.

Parameters have the names of the public weights. Its slow parts are kept on purpose: one mask ratio per batch, orders in
a Python loop, the head on every row, embeddings of time and condition recomputed for every row and diffusion step,
tables copied to the device value by value, an EMA tensor by tensor, and the loss read in every step.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1000


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, d)))


class Mlp(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, dropout), Mlp(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).to(t.device)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Head(nn.Module):
    def __init__(self, channels: int, condition: int, depth: int, width: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        x = self.input_proj(x)
        y = self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def guided(self, x: Tensor, t: Tensor, c: Tensor, scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, c)
        eps, v = out.chunk(2, dim=1)
        with_class, without = eps.chunk(2)
        eps = without + scale * (with_class - without)
        return torch.cat([torch.cat([eps, eps]), v], dim=1)


def betas() -> np.ndarray:
    """β of the cosine schedule."""
    bar = lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.array([min(1 - bar((i + 1) / STEPS) / bar(i / STEPS), 0.999) for i in range(STEPS)])


class Diffusion:
    """The process on the kept steps `use`, with tables in numpy."""

    def __init__(self, use: Sequence[int]) -> None:
        bar, last, kept = np.cumprod(1 - betas()), 1.0, []
        for step in use:
            kept.append(1 - bar[step] / last)
            last = bar[step]
        beta = np.array(kept)
        self.map = list(use)
        self.bar = np.cumprod(1 - beta)
        before = np.append(1.0, self.bar[:-1])
        variance = beta * (1 - before) / (1 - self.bar)
        self.log_beta = np.log(beta)
        self.log_variance = np.log(np.append(variance[1], variance[1:]))
        self.coef1 = beta * np.sqrt(before) / (1 - self.bar)
        self.coef2 = (1 - before) * np.sqrt(1 - beta) / (1 - self.bar)

    def take(self, table: np.ndarray, t: Tensor) -> Tensor:
        return torch.from_numpy(table).to(t.device)[t].float()[:, None]

    def posterior(self, out: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance from the model's output `out`."""
        eps, v = out.chunk(2, dim=1)
        low, high, fraction = self.take(self.log_variance, t), self.take(self.log_beta, t), (v + 1) / 2
        x0 = self.take(np.sqrt(1 / self.bar), t) * x - self.take(np.sqrt(1 / self.bar - 1), t) * eps
        return self.take(self.coef1, t) * x0 + self.take(self.coef2, t) * x, fraction * high + (1 - fraction) * low

    def losses(self, head: Head, x0: Tensor, t: Tensor, c: Tensor, noise: Tensor) -> Tensor:
        """MSE of ε plus the variational term in bits per dimension: [R]."""
        x = self.take(np.sqrt(self.bar), t) * x0 + self.take(np.sqrt(1 - self.bar), t) * noise
        out = head(x, t, c)
        eps, v = out.chunk(2, dim=1)
        mean, log_variance = self.posterior(torch.cat([eps.detach(), v], dim=1), x, t)
        true_mean = self.take(self.coef1, t) * x0 + self.take(self.coef2, t) * x
        true_log = self.take(self.log_variance, t)
        kl = 0.5 * (
            -1 + log_variance - true_log + torch.exp(true_log - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )  # fmt: skip
        cdf = lambda y: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        centred, inverse = x0 - mean, torch.exp(-0.5 * log_variance)
        plus, minus = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
        inside = torch.log((plus - minus).clamp(min=1e-12))
        edges = torch.where(x0 > 0.999, torch.log((1 - minus).clamp(min=1e-12)), inside)
        nll = -torch.where(x0 < -0.999, torch.log(plus.clamp(min=1e-12)), edges)
        vb = torch.where(t == 0, nll.mean(1), kl.mean(1)) / math.log(2)
        return ((noise - eps) ** 2).mean(1) + vb

    def sample(self, head: Head, c: Tensor, x: Tensor, scale: float, noises: Sequence[Tensor] | None) -> Tensor:
        """Ancestral sampling of both halves from x [2R, C], or of x [R, C] if the scale is 1."""
        for done, step in enumerate(range(len(self.map))[::-1]):
            t = torch.tensor([step] * len(x), device=x.device)
            original = torch.tensor(self.map, device=x.device)[t]
            out = head(x, original, c) if scale == 1 else head.guided(x, original, c, scale)
            mean, log_variance = self.posterior(out, x, t)
            noise = torch.randn_like(x) if noises is None else noises[done]
            x = mean + (t != 0).float()[:, None] * torch.exp(0.5 * log_variance) * noise
        return x


def evenly_spaced(count: int) -> list[int]:
    """The training steps of a respacing to `count`."""
    stride, at, kept = (STEPS - 1) / (count - 1), 0.0, []
    for _ in range(count):
        kept.append(round(at))
        at += stride
    return kept


class MAR(nn.Module):
    def __init__(
        self, width: int, blocks: int, heads: int, head_depth: int, head_width: int, channels: int, grid: int = 16,
        buffer: int = 64, classes: int = 1000, dropout: float = 0.1, mul: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n, self.buffer, self.mul, self.channels = grid**2, buffer, mul, channels
        self.class_emb = nn.Embedding(classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj, self.z_proj_ln = nn.Linear(channels, width), nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer + self.n, width))
        self.encoder_blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer + self.n, width))
        self.decoder_blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.n, width))
        self.diffloss = nn.ModuleDict({"net": Head(channels, width, head_depth, head_width)})
        self.training_process = Diffusion(range(STEPS))

    def orders(self, images: int) -> Tensor:
        orders = []
        for _ in range(images):
            order = np.array(list(range(self.n)))
            np.random.shuffle(order)
            orders.append(order)
        return torch.from_numpy(np.array(orders))

    def mask(self, orders: Tensor, count: int) -> Tensor:
        return torch.zeros(len(orders), self.n).scatter(1, orders[:, :count], 1.0)

    def backbone(self, x: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        """z [B, N, D]."""
        x = self.z_proj(x)
        b, _, d = x.shape
        x = torch.cat([torch.zeros(b, self.buffer, d, device=x.device), x], dim=1)
        whole = torch.cat([torch.zeros(b, self.buffer, device=x.device), mask], dim=1)
        if self.training:
            dropped = (torch.rand(b) < 0.1)[:, None].to(x)
            classes = dropped * self.fake_latent + (1 - dropped) * classes
        x[:, : self.buffer] = classes[:, None]
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = x[(1 - whole).nonzero(as_tuple=True)].reshape(b, -1, d)
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder_norm(x))
        filled = self.mask_token.repeat(b, whole.shape[1], 1).to(x.dtype)
        after = filled.clone()
        after[(1 - whole).nonzero(as_tuple=True)] = x.reshape(-1, d)
        x = after + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer :] + self.diffusion_pos_embed_learned

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The training loss of one batch."""
        rate = 0.0
        while not 0.7 <= rate <= 1.0:  # the truncated normal
            rate = np.random.normal(1.0, 0.25)
        mask = self.mask(self.orders(len(tokens)), math.ceil(self.n * rate)).to(tokens.device)
        rows = len(tokens) * self.n * self.mul
        t = torch.randint(0, STEPS, (rows,), device=tokens.device)
        return self.loss(tokens, self.class_emb(labels), mask, t, torch.randn(rows, self.channels, device=t.device))

    def loss(self, tokens: Tensor, classes: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        z = self.backbone(tokens, mask, classes).reshape(-1, classes.shape[1]).repeat(self.mul, 1)
        target = tokens.reshape(-1, self.channels).repeat(self.mul, 1)
        losses = self.training_process.losses(self.diffloss["net"], target, t, z, noise)
        weight = mask.reshape(-1).repeat(self.mul)
        return (losses * weight).sum() / weight.sum()

    @torch.no_grad()
    def sample(self, labels: Tensor, steps: int, diffusion_steps: int, guidance: float) -> Tensor:
        """Tokens [B, N, C] with linear guidance."""
        b, device = len(labels), labels.device
        process, orders = Diffusion(evenly_spaced(diffusion_steps)), self.orders(b).to(device)
        mask, tokens = torch.ones(b, self.n, device=device), torch.zeros(b, self.n, self.channels, device=device)
        for step in range(steps):
            current = tokens.clone()
            classes = torch.cat([self.class_emb(labels), self.fake_latent.repeat(b, 1)])
            z = self.backbone(torch.cat([tokens, tokens]), torch.cat([mask, mask]), classes)
            left = torch.Tensor([np.floor(self.n * np.cos(math.pi / 2 * (step + 1) / steps))]).to(device)
            left = torch.maximum(torch.ones(1, device=device), torch.minimum(mask[:1].sum(1) - 1, left))
            after = torch.zeros(b, self.n, device=device).scatter(1, orders[:, : int(left.item())], 1.0)
            revealed = mask.bool() if step == steps - 1 else torch.logical_xor(mask.bool(), after.bool())
            mask = after
            where = revealed.nonzero(as_tuple=True)
            z = z[torch.cat([revealed, revealed]).nonzero(as_tuple=True)]
            scale = 1 + (guidance - 1) * (self.n - left.item()) / self.n
            noise = torch.randn(len(z) // 2, self.channels, device=device)
            drawn = process.sample(self.diffloss["net"], z, torch.cat([noise, noise]), scale, None)
            current[where] = drawn[: len(drawn) // 2]
            tokens = current.clone()
        return tokens


class Training:
    """MAR's loop: clip at 3, AdamW, EMA of 0.9999 parameter by parameter."""

    def __init__(self, model: MAR) -> None:
        self.model, self.ema = model.train(), copy.deepcopy(list(model.parameters()))
        plain = [p for name, p in model.named_parameters() if p.ndim == 1 or "diffloss" in name]
        decayed = [p for name, p in model.named_parameters() if not (p.ndim == 1 or "diffloss" in name)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        loss = self.model(tokens, labels)
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, live in zip(self.ema, self.model.parameters()):
                average.mul_(0.9999).add_(live, alpha=1e-4)
        return value
