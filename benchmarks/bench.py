"""`make bench`: each row is a ratio of two things timed in turn in this process, so that the machine cancels out.

Width 384, 6+6 blocks, head 3 x 512, token dim 32, 256 positions, batch 8. Operators are held against the composition of
torch's own, at their sizes in training; their rows end with the bytes that each allocates at once, over those of the
output. Writes bench.json.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mixar import draws
from mixar.checkpoint import environment
from mixar.config import GUIDANCES, Config, MaskConfig, ModelConfig, TrainConfig
from mixar.dist import Place, find
from mixar.draws import Stream
from mixar.engine import build_engine
from mixar.mixing import Masking, masked_counts
from mixar.model import MixAR, init_weights, initial_value
from mixar.objectives.base import mean_of
from mixar.ops import mix_gather, timestep_embed
from mixar.ops.mix_gather import reference as mix_gather_reference
from mixar.ops.timestep_embed import reference as timestep_reference

BATCH, N, C, MUL = 8, 256, 32, 4
Work = Callable[[], object]


def config_of(guidance: str) -> ModelConfig:
    sizes = {"encoder_width": 384, "encoder_depth": 6, "encoder_heads": 6}
    return ModelConfig(
        guidance=guidance, latent_channels=C, code_bits=14, classes=1000, dropout=0.1, head_depth=3, head_width=512,
        **sizes, **{name.replace("encoder", "decoder"): value for name, value in sizes.items()},
    )  # fmt: skip


class FixedData:
    """MixAR on data that never change, all draws included."""

    def __init__(self, cfg: ModelConfig, device: torch.device) -> None:
        self.cfg, self.index = cfg, torch.arange(BATCH, device=device)
        self.tokens = draws.normal(0, Stream.POSTERIOR, self.index, N, C)
        codes = draws.bits(0, Stream.PRIOR_TOKEN, self.index, N) & (2**14 - 1)
        self.codes = None if cfg.guidance == "none" else codes
        self.counts = sorted(masked_counts(MaskConfig(group=BATCH), N, 0, range(BATCH), BATCH))

    def build(self) -> torch.nn.Module:
        return MixAR(self.cfg)

    def initial(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return initial_value(name, like, 0)

    def decays(self, name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim > 1

    def loss(self, model, batch, epoch):
        index, rows = self.index, sum(self.counts)
        masking = Masking.from_order(draws.permutation(0, Stream.MASK_ORDER, index, N), self.counts)
        t = (draws.uniform(0, Stream.TIMESTEP, index[:1], MUL, rows)[0] * 1000).long()
        noise = draws.normal(0, Stream.NOISE, index[:1], MUL, rows, C)[0]
        value = model(self.tokens, index, masking, self.codes, t, noise, keys=index).loss
        return value, {"loss": mean_of(value)}


def training_step(guidance: str, precision: str) -> Work:
    """One optimizer step."""
    place = Place(0, 1, find().device)
    cfg = Config(model=config_of(guidance), train=TrainConfig(precision=precision))
    engine = build_engine(cfg, FixedData(cfg.model, place.device), lambda epoch: 1e-4, place, Path())
    return lambda: engine.step([None], 0.0).loss.item()


def head_pass(rows: int) -> Work:
    """Forward and backward of the head on so many rows."""
    model = MixAR(config_of("none"))
    init_weights(model, 0)
    model.to(find().device)
    x, z = torch.randn(rows, C, device=find().device), torch.randn(rows, 384, device=find().device)
    t = torch.randint(0, 1000, (rows,), device=find().device)

    def work() -> float:
        eps, v = model.diffloss.net(x, t, z)
        (eps.square().mean() + v.mean()).backward()
        model.zero_grad()
        return eps.sum().item()

    return work


def mix_gather_passes(batch: int, width: int) -> dict[str, tuple[Work, Work]]:
    """Forward and backward of mix_gather under TI-Mix, compiled and composed of torch's operators."""
    place, prefix = find().device, 64
    index = torch.arange(batch, device=place)
    counts = masked_counts(MaskConfig(group=batch), N, 0, range(batch), batch)
    slots = Masking.from_order(draws.permutation(0, Stream.MASK_ORDER, index, N), counts).slots(prefix)
    codes, drawn = (draws.bits(0, stream, index, N) & (2**14 - 1) for stream in (Stream.PRIOR_TOKEN, Stream.PRIOR_FILL))
    rho, share = draws.uniform(0, Stream.RHO, index, N), torch.full((1,), 0.5, device=place)
    sizes = ((int((slots >= 0).sum()), width), (width, 14), (width,), (prefix + N, width))
    leaves = encoded, weight, bias, positions = [torch.randn(size, device=place, requires_grad=True) for size in sizes]
    grad = torch.randn(batch, prefix + N, width, device=place)
    fused = lambda: mix_gather(encoded, slots, codes, weight, bias, positions, drawn, rho, share)
    plain = lambda: mix_gather_reference(encoded, slots, codes, drawn, rho, share, weight, bias, positions)

    def backward(out: torch.Tensor) -> Work:
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)[-1][0, 0].item()

    return {
        "forward": (lambda: fused()[0, 0, 0].item(), lambda: plain()[0, 0, 0].item()),
        "backward": (backward(fused()), backward(plain())),
    }


def timestep_passes(rows: int) -> tuple[Work, Work]:
    """timestep_embed, compiled and composed of torch's operators."""
    t = torch.randint(0, 1000, (rows,), device=find().device).float()
    frequencies = torch.logspace(0, -4, 128, device=find().device)
    plain = lambda: timestep_reference(t, frequencies, torch.float32)[0, 0].item()
    return lambda: timestep_embed(t)[0, 0].item(), plain


def peak(work: Work) -> int:
    """The most bytes that `work` holds at once beyond what was there."""
    if find().device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def operator_rows(rounds: int) -> list[dict]:
    """Time and peak memory of each compiled operator over its composition; peaks also over the output's size."""
    rows = []
    for batch, width in ((32, 1024), (BATCH, 384)):
        output = 4 * batch * (64 + N) * width
        for direction, works in mix_gather_passes(batch, width).items():
            row = ratio(f"mix_gather {direction}: compiled / composed, {batch} x {width}", *works, rounds)
            rows.append(row | {"peak / output": [peak(work) / output for work in works]})
    works = timestep_passes(28_416)
    row = ratio("timestep_embed: compiled / composed, 28,416 rows", *works, rounds)
    rows.append(row | {"peak / output": [peak(work) / (4 * 28_416 * 256) for work in works]})
    for row in rows:
        compiled, composed = row["peak / output"]
        print(f"{row['row']:55} peak {compiled:.2f} over {composed:.2f} of the output")
    return rows


def ratio(name: str, numerator: Work, denominator: Work, rounds: int) -> dict:
    """Time of `numerator` over time of `denominator`, timed in turn; the median and the range over the rounds."""
    numerator(), denominator()
    found = []
    for _ in range(rounds):
        seconds = []
        for work in (numerator, denominator):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        found.append(seconds[0] / seconds[1])
    row = {"row": name, "ratio": statistics.median(found), "low": min(found), "high": max(found), "rounds": rounds}
    print(f"{name:55} {row['ratio']:6.2f}   {row['low']:.2f} to {row['high']:.2f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    print(f"{'time of ... over time of ...':55} {'median':>6}   range over {args.rounds} rounds")
    plain = training_step("none", "fp32")
    rows = [ratio(f"step: {g} / none, fp32", training_step(g, "fp32"), plain, args.rounds) for g in GUIDANCES[1:]]
    rows.append(ratio("step: fp32 / bf16, none", plain, training_step("none", "bf16"), args.rounds))
    masked = round(0.867 * N) * BATCH
    rows.append(ratio("head: all rows / masked rows, fp32", head_pass(N * BATCH), head_pass(masked), args.rounds))
    rows += operator_rows(args.rounds)
    args.out.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
