"""The sampling of discrete tokens from the prior: MaskBit's iterative decoding, and TI-Mix's single pass."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixar import rng
from mixar.config import SampleConfig
from mixar.errors import not_finite
from mixar.prior.lfqbert import Prior
from mixar.prior.tokens import combine_ids, split_ids
from mixar.rng import Stream

Draws = Callable[[int], Tensor]  # step -> [B, N, m]


@dataclass
class DecodingStep:
    """The record of a decoding step; all are [B, N, m], but the probabilities [B, N, m, K]."""

    masked_before: Tensor  # the network's input
    probs: Tensor  # with cfg_scale and temperature applied
    draws: Tensor  # one per sub-token, also for those that are fixed already
    pred: Tensor  # the complete grid: fixed sub-tokens, and this step's draws
    confidence: Tensor  # log probability of `pred` plus annealed Gumbel noise, inf where fixed before


def mask_counts(total: int, steps: int, schedule: str) -> list[int]:
    """The number of the `total` sub-tokens that are masked after each step.

    It is the `arccos` or `cosine` schedule of the progress, times `total`, rounded down; at least 1, and at least one
    less than before. Where only one was left, MaskBit's clamp wraps around and masks everything again. That is kept, to
    equal MaskBit with any settings, but it discards the sub-tokens drawn so far. It happens before the last step
    exactly if `steps` exceeds `total`, so use fewer steps.
    """
    # float32 throughout, since the rounding down near an integer depends on it
    progress = torch.tensor([(step + 1) / steps for step in range(steps)], dtype=torch.float32)
    rate = progress.acos() / (math.pi / 2) if schedule == "arccos" else (progress * math.pi / 2).cos()
    counts, count = [], total
    for wanted in (rate.clamp(1e-6, 1) * total).long().tolist():
        count = min(max(wanted, 1), count - 1) or total
        counts.append(count)
    return counts


def guidance_weights(scale: float, steps: int, schedule: str, power: float) -> list[float]:
    """w of each step in logits = cond + w (cond - uncond): `scale` times a factor of q = step / steps.

    By `schedule` the factor is 1 (`none`), q (`linear`) or (1 - cos(π q^power)) / 2 (`cosine`).
    """
    anneal: dict[str, Callable[[float], float]] = {
        "none": lambda q: 1.0,
        "linear": lambda q: q,
        "cosine": lambda q: (1 - math.cos(math.pi * q**power)) / 2,
    }
    return [scale * anneal[schedule](step / steps) for step in range(steps)]


def keyed_draws(seeds: Tensor, n: int, m: int) -> tuple[Draws, Draws]:
    """(u, gumbel) for `sample_codes`, a pure function of the step and the seed per image, int64 [B]."""
    return (
        lambda step: rng.uniform(0, Stream.PRIOR_TOKEN, seeds, n, m, start=step * n * m),
        lambda step: rng.gumbel(0, Stream.PRIOR_GUMBEL, seeds, n, m, start=step * n * m),
    )


def sample_codes(prior: Prior, labels: Tensor, settings: SampleConfig, u: Draws, gumbel: Draws) -> Tensor:
    """Code ids int64 [B, N] of new images.

    Args:
        prior: in eval mode.
        labels: int64 [B] classes.
        settings: its `prior_*` fields are used.
        u: step -> [B, N, m] uniform on [0, 1), to draw sub-tokens.
        gumbel: step -> [B, N, m] standard Gumbel, for the order in which sub-tokens are fixed.

    Raises:
        UserError: the prior gives values that are not finite.
    """
    broken = torch.zeros((), dtype=torch.bool, device=labels.device)
    for step in decoding_steps(prior, labels, settings, u, gumbel):
        pred = step.pred
        broken |= step.confidence.isnan().any()
    if broken:  # read once, since it waits for the device
        raise not_finite("prior")
    return combine_ids(pred, prior.config.bits)


@torch.no_grad()
def decoding_steps(
    prior: Prior, labels: Tensor, settings: SampleConfig, u: Draws, gumbel: Draws
) -> Iterator[DecodingStep]:
    """The steps of `sample_codes`: draw every masked sub-token, fix the most confident, mask the others again."""
    assert not prior.training, "sampling with dropout on"
    steps, shape = settings.prior_steps, (len(labels), prior.config.grid**2, prior.config.splits)
    weights = guidance_weights(settings.prior_cfg_scale, steps, settings.prior_cfg_schedule, settings.prior_cfg_power)
    counts = mask_counts(shape[1] * shape[2], steps, settings.prior_mask_schedule)
    tokens = torch.full(shape, prior.mask_id, device=labels.device)
    for step, (weight, count) in enumerate(zip(weights, counts)):
        left = 1 - (step + 1) / steps
        temperature = 0.5 + 0.8 * left if settings.prior_annealing else settings.prior_temperature
        probs = (_guided_logits(prior, tokens, labels, weight) / temperature).softmax(-1)
        drawn = rng.categorical(probs, u(step))
        masked = tokens == prior.mask_id
        pred = torch.where(masked, drawn, tokens)
        chosen = probs.gather(-1, pred[..., None])[..., 0].log()
        confidence = chosen.masked_fill(~masked, math.inf) + gumbel(step) * settings.prior_randomize * left
        yield DecodingStep(masked_before=tokens, probs=probs, draws=drawn, pred=pred, confidence=confidence)
        threshold = confidence.flatten(1).sort(-1).values[:, count - 1]
        tokens = pred.masked_fill(confidence <= threshold[:, None, None], prior.mask_id)


def _guided_logits(prior: Prior, tokens: Tensor, labels: Tensor, weight: float) -> Tensor:
    if weight == 0:
        return prior(tokens, labels).float()
    drop = torch.arange(2 * len(labels), device=labels.device) >= len(labels)
    cond, uncond = prior(tokens.repeat(2, 1, 1), labels.repeat(2), drop).float().chunk(2)
    return cond + weight * (cond - uncond)


@torch.no_grad()
def fill(prior: Prior, codes: Tensor, masked: Tensor, labels: Tensor, u: Tensor | None) -> Tensor:
    """TI-Mix's x̂_d (Eqs. 10-11): the masked codes, drawn by the prior from the visible ones in one pass.

    Args:
        prior: in eval mode.
        codes: int64 [B, N] ids, of which only those at visible positions are read.
        masked: bool [B, N]; all sub-tokens of a masked position are masked.
        labels: int64 [B] classes.
        u: [B, N, m] uniform on [0, 1), to draw from the softmax at temperature 1; None takes the most likely code.

    Returns:
        int64 [B, N]: the draws where masked, `codes` elsewhere.
    """
    assert not prior.training, "drawing with dropout on"
    tokens = split_ids(codes, prior.config.bits, prior.config.splits).masked_fill(masked[..., None], prior.mask_id)
    logits = prior(tokens, labels).float()
    drawn = logits.argmax(-1) if u is None else rng.categorical(logits.softmax(-1), u)
    return torch.where(masked, combine_ids(drawn, prior.config.bits), codes)
