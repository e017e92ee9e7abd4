"""The computation of a training step: tokens per image in each part, and their FLOP."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mixar.config import Config, ModelConfig
from mixar.mixing import ground_truth_share, masked_counts
from mixar.model import MixAR, guidance_of, process_of
from mixar.prior import Prior

RECOMPUTED = {  # parameters of the blocks that each `engine.recompute` runs forward twice
    "none": (),
    "backbone": ("encoder_blocks.", "decoder_blocks."),
    "head": ("diffloss.net.res_blocks.",),
    "all": ("encoder_blocks.", "decoder_blocks.", "diffloss.net.res_blocks."),
}
# layers applied to data: no gradient flows to their input
FIRST = ("z_proj.", "diffloss.net.input_proj.", "diffloss.net.time_embed.mlp.0.")


@dataclass(frozen=True)
class Tokens:
    """Tokens per image in each part of MixAR, as means over images.

    Attributes:
        images: number of images per pass, whose rows share one table of embedded times.
    """

    encoder: float  # prefix + V
    pairs: float  # (prefix + V)², the query-key pairs of the encoder's self-attention
    decoder: int  # prefix + N
    masked: float  # N - V
    rows: float  # of the head: masked positions x noise levels
    times: float  # times that the head embeds: those of the rows, or of the process if it has fewer
    images: int

    @classmethod
    def of(cls, cfg: ModelConfig, visible: Sequence[int], images: int) -> "Tokens":
        """Means over images with `visible` visible positions each, in passes of `images`."""
        prefix = cfg.class_tokens + guidance_of(cfg).prefix
        lengths = [prefix + v for v in visible]
        masked = cfg.tokens - sum(visible) / len(visible)
        rows = masked * cfg.diffusion_batch_mul
        return cls(
            sum(lengths) / len(lengths), sum(length**2 for length in lengths) / len(lengths), prefix + cfg.tokens,
            masked, rows, min(rows, process_of(cfg.process).levels / images), images,
        )  # fmt: skip


def mean_tokens(cfg: Config, images: int) -> Tokens:
    """Means over the distribution of the mask ratio (Eq. 8), from 1024 quantiles, in passes of `images`."""
    fine = replace(cfg.mask, ratio_scope="image", group=1024)
    counts = masked_counts(fine, cfg.model.tokens, 0, range(1024), 1024)
    return Tokens.of(cfg.model, [cfg.model.tokens - count for count in counts], images)


def matrices(module: nn.Module) -> dict[str, int]:
    """The size of each matrix that multiplies tokens: not tables, nor the map of code bits, which sums its columns."""
    return {
        name: p.numel()
        for name, p in module.named_parameters()
        if p.ndim == 2 and name.endswith("weight") and not name.endswith(("_emb.weight", "code_proj.weight"))
    }


def training_flops(model: MixAR, tokens: Tokens, recompute: str = "none") -> dict[str, float]:
    """FLOP per image of the backbone and of the head, forward and backward; a multiply-add is two.

    A matrix [in, out] on T tokens costs 2·T·in·out, and as much again for each of its two gradients; attention of
    width D costs 4·D per query-key pair, and twice that backward. Norms, activations and the loss are left out.
    """
    flops = {"backbone": 0.0, "head": 0.0}
    for name, size in matrices(model).items():
        passes = 3 - name.startswith(FIRST) + name.startswith(RECOMPUTED[recompute])
        part = "head" if name.startswith("diffloss.") else "backbone"
        flops[part] += 2 * passes * size * _tokens_at(name, model, tokens)
    flops["backbone"] += (4 if recompute in ("backbone", "all") else 3) * attention_flops(model, tokens)
    return flops


def attention_flops(model: MixAR, tokens: Tokens) -> float:
    """FLOP per image of the attention itself, in one forward pass."""
    cfg, crossed = model.config, model.guidance.memory_tokens
    encoder = cfg.encoder_depth * cfg.encoder_width * (tokens.pairs + tokens.encoder * crossed)
    queries = (cfg.decoder_depth - 1) * tokens.decoder + tokens.masked  # the last block: masked ones only
    return 4 * (encoder + cfg.decoder_width * queries * (tokens.decoder + crossed))


def _tokens_at(name: str, model: MixAR, tokens: Tokens) -> float:
    """Tokens per image that the matrix `name` multiplies."""
    cfg = model.config
    if name.startswith("diffloss.net.time_embed.") or name.endswith(".adaLN_modulation.time.weight"):
        return tokens.times
    if name.startswith("diffloss.net.cond_embed."):
        return tokens.masked
    if name.endswith(".adaLN_modulation.1.weight"):
        return tokens.masked if cfg.separable_adaln else tokens.rows
    if name.startswith("diffloss."):
        return tokens.rows
    if name.startswith("z_proj."):
        return cfg.tokens
    if ".cross_attn.k." in name or ".cross_attn.v." in name:
        return model.guidance.memory_tokens
    if name.startswith(f"decoder_blocks.{cfg.decoder_depth - 1}.") and ".attn.qkv." not in name:
        return tokens.masked  # at the other positions only keys and values are computed
    return tokens.decoder if name.startswith("decoder_blocks.") else tokens.encoder


def prior_flops(prior: Prior) -> float:
    """FLOP per image of the prior's forward pass."""
    cfg, n = prior.config, prior.config.grid**2
    linear = sum(2 * (n + name.startswith("transformer.")) * size for name, size in matrices(prior).items())
    return linear + 4 * cfg.depth * cfg.width * (n + 1) ** 2


def step_flops(cfg: Config, images: int, prior: Prior | None) -> Callable[[float], float]:
    """FLOP per image of a step of MixAR, by epoch: the model's, and the prior's while TI-Mix runs it.

    What `engine.recompute` computes twice counts once, as MFU is defined.

    Args:
        images: images per pass.
        prior: that of TI-Mix online.
    """
    with torch.device("meta"):
        model = MixAR(cfg.model)
    own = sum(training_flops(model, mean_tokens(cfg, images)).values())
    drawing = 0.0 if prior is None else prior_flops(prior)
    return lambda epoch: own + drawing * (ground_truth_share(cfg.ti_mix, epoch) < 1)


def prior_share(cfg: Config) -> float:
    """The share of the run's steps in which TI-Mix runs the prior, those with λ < 1."""
    if not cfg.ti_mix.enabled or cfg.ti_mix.source != "online":
        return 0.0
    epochs = [cfg.train.epochs * (i + 0.5) / 1024 for i in range(1024)]
    return sum(ground_truth_share(cfg.ti_mix, epoch) < 1 for epoch in epochs) / 1024
