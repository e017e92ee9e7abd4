"""MAR's autoregressive loop: reveal positions step by step, each denoised by the diffusion head (Eq. 6)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mixar import rng
from mixar.config import SampleConfig
from mixar.mixing import Masking
from mixar.model import SOLVERS, STOCHASTIC, MixAR, Process, Solver, process_of
from mixar.model.attention import Wanted
from mixar.model.head import Head
from mixar.rng import Stream


@dataclass(frozen=True)
class Reveal:
    """One autoregressive step.

    Attributes:
        before, after: positions that are masked at its start and at its end.
        cfg_scale: of classifier-free guidance; 1 runs no unconditional branch.
        diffusion_steps: the respacing of its diffusion.
    """

    before: int
    after: int
    cfg_scale: float
    diffusion_steps: str


def reveal_schedule(tokens: int, settings: SampleConfig) -> list[Reveal]:
    """The positions that each of the K steps reveals: MAR's cosine schedule.

    With more steps than positions, some reveal nothing.

    In checkerboard order the first half is revealed by that schedule, the second in the last two steps (in one where
    there are fewer than four). DiSA (Zhao et al. 2025) lets the diffusion steps fall linearly.

    Args:
        tokens: N.
    """
    steps, late, tail = settings.steps, 0, 0
    if settings.order == "checkerboard":
        tail = min(2, steps // 2)
        late = tokens // 2 if tail else 0  # positions for the last steps
    masked = [tokens, *(late + left for left in _cosine(tokens - late, steps - tail))]
    masked += [late * (tail - 1 - i) // tail for i in range(tail)]
    plan, (first, last) = [], settings.cfg_interval
    for step, (before, after) in enumerate(pairwise(masked)):
        scale = settings.cfg_scale
        if settings.cfg_schedule == "linear":
            scale = 1 + (scale - 1) * (tokens - max(1, after)) / tokens
        if not first <= step / steps < last:
            scale = 1.0
        diffusion_steps = settings.diffusion_steps
        if settings.diffusion_steps_end is not None:
            fewest, left = settings.diffusion_steps_end, steps - 1 - step
            fall = left * (int(diffusion_steps) - fewest) // max(1, steps - 1)
            diffusion_steps = str(fewest + fall)
        plan.append(Reveal(before, after, scale, diffusion_steps))
    return plan


def _cosine(tokens: int, steps: int) -> list[int]:
    """Positions masked after each of the steps."""
    counts = [tokens]
    for step in range(steps):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        counts.append(max(1, min(counts[-1] - 1, wanted)))
    return [*counts[1:-1], 0]


def sampling_order(kind: str, seeds: Tensor, tokens: int) -> Tensor:
    """int64 [B, N], the order of each image by its own seed; positions late in it are generated first.

    Args:
        kind: `random`; or `checkerboard`, which fills one checkerboard after the other, each finer than the last, and
            each at random.
        seeds: int64 [B].
        tokens: N, of a square grid.
    """
    if kind == "random":
        return rng.permutation(0, Stream.SAMPLE_ORDER, seeds, tokens)
    side = math.isqrt(tokens)
    levels = torch.tensor([_level(i, j) for i in range(side) for j in range(side)], dtype=torch.int64)
    chance = rng.bits(0, Stream.SAMPLE_ORDER, seeds, tokens) >> 8  # leaves the high bits to the level
    return (chance + (levels.to(seeds.device) << 56)).argsort(-1)


def _level(row: int, column: int) -> int:
    """The number of times the checkerboard can be made coarser with this position still on it."""
    if row == column == 0:
        return 32
    if (row ^ column) & 1:
        return 0
    return 1 if row & 1 else 2 + _level(row >> 1, column >> 1)


class Noise(Protocol):
    """The source of the loop's normal draws. Rows are indices into the flattened [B*N] positions."""

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
        counts: the number of diffusion steps of each autoregressive step, whose noise is drawn at once.
    """

    def __init__(self, seeds: Tensor, tokens: int, channels: int, counts: Sequence[int]) -> None:
        self.channels, self.counts = channels, counts
        self._keys = rng.bits(0, Stream.SAMPLE_INIT, seeds, tokens).flatten()  # one per position: rows draw alone
        self._drawn: tuple[int, Tensor] | None = None  # of the current autoregressive step: [S, R, C]

    def initial(self, step: int, rows: Tensor) -> Tensor:
        return rng.normal(0, Stream.SAMPLE_INIT, self._keys[rows], self.channels)

    def during(self, step: int, diffusion_step: int, rows: Tensor) -> Tensor:
        if self._drawn is None or self._drawn[0] != step:
            even = self.channels + self.channels % 2  # each diffusion step begins with a new pair
            drawn = rng.normal(0, Stream.SAMPLE_STEP, self._keys[rows], self.counts[step] - 1, even)
            # a step's lie together: a compiled step then does not depend on their number
            self._drawn = step, drawn[..., : self.channels].transpose(0, 1).contiguous()
        return self._drawn[1][diffusion_step]


def predict(
    head: Head, x: Tensor, time: Tensor, conditions: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The head's prediction and variance fraction for rows that share a timestep, [R, C] each.

    Args:
        x: [R, C].
        time: [1, w], the embedded timestep.
        conditions: [R, w] embedded; under guidance [2R, w], with class, then without.
        scale: []; the prediction, ε for one, is guided as ε_null + scale · (ε - ε_null), the variance never is. None
            without guidance.
    """
    y = head.embed(time, conditions)
    if scale is None:
        return head.denoise(x, y)
    both, fractions = head.denoise(x.repeat(2, 1), y)
    prediction, null = both.chunk(2)
    return null + scale * (prediction - null), None if fractions is None else fractions[: len(x)]


def diffusion_step(
    head: Head, process: Process, solve: Solver, step: int | Tensor, x: Tensor, before: Tensor | None,
    noise: Tensor | None, time: Tensor, conditions: Tensor, scale: Tensor | None, temperature: float | Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One step of the diffusion: the head with its guidance, and the solver's update of what it predicts.

    Args:
        step, x, before, noise, temperature: as of a `Solver`, whose results are returned.
        time, conditions, scale: as of `predict`.
    """
    return solve(process, step, x, predict(head, x, time, conditions, scale), before, noise, temperature)


DiffusionStep = Callable[..., tuple[Tensor, Tensor | None]]
"""`diffusion_step`, or what it was compiled to; the step and the temperature are numbers."""


def compiled_step(device: torch.device) -> DiffusionStep:
    """`diffusion_step` by torch.compile: on a GPU a CUDA graph for each number of rows, elsewhere one graph for all."""
    if device.type != "cuda":
        return by_tensors(torch.compile(diffusion_step, fullgraph=True, dynamic=True), device, replayed=False)
    torch._dynamo.config.recompile_limit = 128  # at most one per step of the reveal schedule
    graphs = torch.compile(diffusion_step, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return by_tensors(graphs, device, replayed=True)


def by_tensors(compiled: DiffusionStep, device: torch.device, replayed: bool) -> DiffusionStep:
    """The compiled `diffusion_step` by a graph that is the same for all steps.

    Args:
        replayed: whether CUDA graphs of fixed sizes run, or one graph for all sizes.
    """

    @lru_cache(maxsize=None, typed=True)
    def on_device(number: float) -> Tensor:
        return torch.full((1,), number, device=device)  # the graph would hold a number as a constant

    def run(
        head: Head, process: Process, solve: Solver, step: int, x: Tensor, before: Tensor | None,
        noise: Tensor | None, time: Tensor, conditions: Tensor, scale: Tensor | None, temperature: float,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if step == 0 and before is None:  # a stochastic solver's: it adds no noise, by the graph of those that do
            noise = torch.zeros_like(x)
        if not replayed:  # a graph for all sizes is one for views, or for none, and for where they begin
            x, time, noise = x.clone(), time.clone(), None if noise is None else noise.clone()
        k, temperatures = on_device(step), on_device(temperature)
        x, clean = compiled(head, process, solve, k, x, before, noise, time, conditions, scale, temperatures)
        if replayed:
            # The next replay writes over what this one returns, and takes none of it as an input. Without gradients
            # each call is a new iteration: cudagraph_mark_step_begin would only force that on the process's others.
            x, clean = x.clone(), None if clean is None else clean.clone()
        return x, clean

    return run


def denoise(
    head: Head,
    process: Process,
    z: Tensor,
    scale: float,
    initial: Tensor,
    noise_at: Callable[[int], Tensor],
    settings: SampleConfig,
    run: DiffusionStep = diffusion_step,
) -> Iterator[Tensor]:
    """The respaced loop of one autoregressive step, yielding the tokens [R, C] after each diffusion step.

    Args:
        z: conditions [R, D]; [2R, D], with class, then without, where `scale` is not 1.
        initial: [R, C].
        noise_at: the number of steps done to the next step's noise [R, C]; not asked where a step needs none.
        settings: the solver and the temperature.
        run: `diffusion_step`, or what it was compiled to.
    """
    # all rows share t, and the condition does not change: both are embedded once, not in every step
    times = head.time_embed(process.timesteps.to(z.device))
    conditions = head.cond_embed(z)
    weight = None if scale == 1 else torch.full((), scale, device=z.device)
    solve, draws = SOLVERS[settings.solver], settings.solver in STOCHASTIC
    # zeros where nothing is predicted yet: None would be a compiled graph of its own
    x, before = initial, None if draws else torch.zeros_like(initial)
    for done, step in enumerate(reversed(range(len(process)))):
        noise = noise_at(done) if draws and step > 0 else None
        time = times[step : step + 1]
        x, before = run(head, process, solve, step, x, before, noise, time, conditions, weight, settings.temperature)
        yield x


@lru_cache(maxsize=64)
def _process(kind: str, spec: str, start: int, device: torch.device) -> Process:
    return process_of(kind, spec, start).to(device)


@dataclass
class Step:
    """The record of one autoregressive step: plan, filled rows, their conditions, and the tokens after it."""

    plan: Reveal
    rows: Tensor  # int64 [R], indices into the flattened [B*N] positions
    z: Tensor  # [R, D], under guidance [2R, D]: with class, then without
    tokens: Tensor  # [B, N, C]


@torch.no_grad()
def sample_steps(
    model: MixAR,
    labels: Tensor | None,
    codes: Tensor | None,
    order: Tensor,
    noise: Noise,
    settings: SampleConfig,
    run: DiffusionStep = diffusion_step,
) -> Iterator[Step]:
    """The loop, one `Step` at a time; steps that reveal nothing are not run.

    Args:
        labels: int64 [B]; None samples without class.
        codes: the discrete tokens x̂_d, int64 [B, N]; None under `guidance: none`.
        order: int64 [B, N]; positions late in it are generated first.
        run: as in `denoise`.
    """
    b, n = order.shape
    tokens = torch.zeros(b, n, model.config.token_dim, device=order.device)
    classes = model.class_embedding(labels, batch=b), model.class_embedding(None, batch=b)
    first_rows = torch.arange(b, device=order.device)[:, None] * n
    for index, plan in enumerate(reveal_schedule(n, settings)):
        if plan.after == plan.before:
            continue
        copies = 1 if plan.cfg_scale == 1 else 2  # under guidance the images once more, without class
        rows = (order[:, plan.after : plan.before].sort(-1).values + first_rows).flatten()
        masking = Masking.from_order(order.repeat(copies, 1), (plan.before,) * (copies * b))
        at = torch.cat([rows + copy * b * n for copy in range(copies)])
        wanted = Wanted(at, (plan.before - plan.after,) * (copies * b))
        guiding = None if codes is None else codes.repeat(copies, 1)
        z = model.condition(tokens.repeat(copies, 1, 1), torch.cat(classes[:copies]), masking, guiding, wanted)
        initial, during = noise.initial(index, rows), partial(noise.during, index, rows=rows)
        process = _process(model.config.process, plan.diffusion_steps, settings.diffusion_start, order.device)
        *_, x = denoise(model.diffloss.net, process, z, plan.cfg_scale, initial, during, settings, run)
        tokens = tokens.flatten(0, 1).index_copy(0, rows, x).view_as(tokens)
        yield Step(plan, rows, z, tokens)


def sample_tokens(
    model: MixAR, labels: Tensor | None, codes: Tensor | None, seeds: Tensor, settings: SampleConfig,
    run: DiffusionStep = diffusion_step,
) -> Tensor:  # fmt: skip
    """Continuous tokens [B, N, C], still normalised, image i drawn from `seeds[i]` alone.

    Args:
        labels, codes, run: as in `sample_steps`.
        seeds: int64 [B].
    """
    n = model.config.tokens
    order = sampling_order(settings.order, seeds, n)
    kind, start = model.config.process, settings.diffusion_start
    plans = reveal_schedule(n, settings)
    counts = [len(_process(kind, plan.diffusion_steps, start, seeds.device)) for plan in plans]
    noise = KeyedNoise(seeds, n, model.config.token_dim, counts)
    for step in sample_steps(model, labels, codes, order, noise, settings, run):
        tokens = step.tokens
    return tokens
