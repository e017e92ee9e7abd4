"""MAR's autoregressive loop: reveal positions step by step, each denoised by the diffusion head (Eq. 6)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mixar import draws
from mixar.draws import Stream
from mixar.mixing import Masking
from mixar.model import Diffusion, MixAR
from mixar.model.head import Head


@dataclass(frozen=True)
class Reveal:
    """One autoregressive step: `before` positions are masked at its start, `after` at its end, `guidance` its scale."""

    before: int
    after: int
    guidance: float


def reveal_schedule(tokens: int, steps: int, guidance: float, schedule: str) -> list[Reveal]:
    """MAR's cosine schedule. With more steps than positions, some steps reveal nothing.

    Args:
        tokens: N.
        steps: K.
        guidance: the scale reached when everything is revealed (`linear`), or used throughout (`constant`).
    """
    plan, masked = [], tokens
    for step in range(steps):
        left = max(1, min(masked - 1, math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))))
        scale = 1 + (guidance - 1) * (tokens - left) / tokens if schedule == "linear" else guidance
        after = 0 if step == steps - 1 else left
        plan.append(Reveal(masked, after, scale))
        masked = after
    return plan


class Noise(Protocol):
    """Where the loop takes its normal draws from. Rows are places in the flattened [B*N] positions."""

    def initial(self, step: int, rows: Tensor) -> Tensor:
        """[R, C], the noise that the diffusion of autoregressive step `step` starts from."""

    def during(self, step: int, diffusion_step: int, rows: Tensor) -> Tensor:
        """[R, C], the noise of its `diffusion_step`-th step in the order of execution."""


class KeyedNoise:
    """Draws of each image from its own seed: image i is the same whatever the batch.

    Args:
        seeds: int64 [B].
        tokens: N.
        channels: C.
    """

    def __init__(self, seeds: Tensor, tokens: int, channels: int) -> None:
        self.channels = channels
        self._keys = draws.bits(0, Stream.SAMPLE_INIT, seeds, tokens).flatten()  # one a position, so rows draw alone

    def initial(self, step: int, rows: Tensor) -> Tensor:
        return draws.normal(0, Stream.SAMPLE_INIT, self._keys[rows], self.channels)

    def during(self, step: int, diffusion_step: int, rows: Tensor) -> Tensor:
        start = diffusion_step * ((self.channels + 1) // 2)
        return draws.normal(0, Stream.SAMPLE_STEP, self._keys[rows], self.channels, start=start)


def denoise(
    head: Head,
    diffusion: Diffusion,
    z: Tensor,
    z_null: Tensor | None,
    scale: float,
    temperature: float,
    initial: Tensor,
    noise_at: Callable[[int], Tensor],
) -> Iterator[Tensor]:
    """The respaced ancestral loop of one autoregressive step, yielding the tokens [R, C] after each diffusion step.

    Args:
        z: conditions [R, D]; `z_null` [R, D] those without class, None without guidance.
        scale: ε is guided as ε_null + scale · (ε - ε_null); the variance is never guided.
        initial: [R, C].
        noise_at: the number of steps done to the next step's noise [R, C].
    """
    # all rows share t, and the condition does not change: both are embedded once, not in every step
    times = head.time_embed(diffusion.timesteps.to(z.device))
    conditions = head.cond_embed(z if z_null is None else torch.cat([z, z_null]))
    x = initial
    for done, step in enumerate(reversed(range(len(diffusion)))):
        if z_null is None:
            eps, v = head.denoise(x, times[step] + conditions)
        else:
            both, fractions = head.denoise(x.repeat(2, 1), times[step] + conditions)
            guided, null = both.chunk(2)
            eps, v = null + scale * (guided - null), fractions[: len(x)]
        x, _ = diffusion.ancestral_step(step, x, eps, v, noise_at(done), temperature)
        yield x


@dataclass
class Step:
    """What one autoregressive step did: its plan, the rows it filled, their conditions, and the tokens after it."""

    plan: Reveal
    rows: Tensor  # int64 [R], places in the flattened [B*N] positions
    z: Tensor  # [R, D], under guidance [2R, D]: with class, then without
    tokens: Tensor  # [B, N, C]


@torch.no_grad()
def sample_steps(
    model: MixAR,
    labels: Tensor | None,
    codes: Tensor | None,
    order: Tensor,
    noise: Noise,
    *,
    steps: int,
    diffusion_steps: str,
    diffusion_start: int,
    guidance: float,
    guidance_schedule: str,
    temperature: float,
) -> Iterator[Step]:
    """The loop, one `Step` at a time; steps that reveal nothing are not run.

    Args:
        labels: int64 [B]; None samples without class.
        codes: the discrete tokens x̂_d, int64 [B, N]; None under `guidance: none`.
        order: int64 [B, N]; positions late in it are generated first.
    """
    b, n = order.shape
    tokens = torch.zeros(b, n, model.config.token_dim, device=order.device)
    diffusion = Diffusion(diffusion_steps, diffusion_start)
    guided = guidance != 1.0
    classes = model.class_embedding(labels, batch=b)
    if guided:
        classes = torch.cat([classes, model.class_embedding(None, batch=b)])
        codes = None if codes is None else codes.repeat(2, 1)
    for index, plan in enumerate(reveal_schedule(n, steps, guidance, guidance_schedule)):
        if plan.after == plan.before:
            continue
        places = order[:, plan.after : plan.before].sort(-1).values
        rows = (places + torch.arange(b, device=order.device)[:, None] * n).flatten()
        copies = 2 if guided else 1
        masking = Masking.from_order(order.repeat(copies, 1), [plan.before] * (copies * b))
        at = torch.cat([rows + copy * b * n for copy in range(copies)])
        z = model.condition(tokens.repeat(copies, 1, 1), classes, masking, codes, at)
        null = z[len(rows) :] if guided else None
        initial, during = noise.initial(index, rows), partial(noise.during, index, rows=rows)
        net = model.diffloss.net
        *_, x = denoise(net, diffusion, z[: len(rows)], null, plan.guidance, temperature, initial, during)
        tokens = tokens.flatten(0, 1).index_copy(0, rows, x).view_as(tokens)
        yield Step(plan, rows, z, tokens)


def sample_tokens(model: MixAR, labels: Tensor | None, codes: Tensor | None, seeds: Tensor, **settings) -> Tensor:
    """Continuous tokens [B, N, C], still normalised, image i drawn from `seeds[i]` alone.

    Args:
        labels, codes: as in `sample_steps`.
        seeds: int64 [B].
        settings: the keyword arguments of `sample_steps`.
    """
    n = model.config.tokens
    order = draws.permutation(0, Stream.SAMPLE_ORDER, seeds, n)
    noise = KeyedNoise(seeds, n, model.config.token_dim)
    for step in sample_steps(model, labels, codes, order, noise, **settings):
        tokens = step.tokens
    return tokens
