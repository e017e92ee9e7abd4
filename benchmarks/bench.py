"""`make bench`: each row is a ratio of two things timed in turn in this process, so that the machine cancels out.

Width 384, 6+6 blocks, head 3 x 512, token dim 32, 256 positions, batch 8. Writes bench.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mixar import draws
from mixar.checkpoint import environment
from mixar.config import GUIDANCES, MaskConfig, ModelConfig, OptimConfig
from mixar.dist import Place, find
from mixar.draws import Stream
from mixar.engine import LocalEngine, build_optimizer
from mixar.mixing import Masking, masked_counts
from mixar.model import MixAR, init_weights
from mixar.objectives.base import mean_of

BATCH, N, C, MUL = 8, 256, 32, 4
Work = Callable[[], object]


def model_of(guidance: str) -> MixAR:
    sizes = {"encoder_width": 384, "encoder_depth": 6, "encoder_heads": 6}
    model = MixAR(ModelConfig(
        guidance=guidance, latent_channels=C, code_bits=14, classes=1000, dropout=0.1, head_depth=3, head_width=512,
        **sizes, **{name.replace("encoder", "decoder"): value for name, value in sizes.items()},
    ))  # fmt: skip
    init_weights(model, 0)
    return model.to(find().device)


def training_step(guidance: str, precision: str) -> Work:
    """One optimizer step on fixed data, all draws included."""
    place = Place(0, 1, find().device)
    model, cfg = model_of(guidance), OptimConfig()
    index = torch.arange(BATCH, device=place.device)
    tokens = draws.normal(0, Stream.POSTERIOR, index, N, C)
    codes = None if guidance == "none" else draws.bits(0, Stream.PRIOR_TOKEN, index, N) & (2**14 - 1)
    counts = sorted(masked_counts(MaskConfig(group=BATCH), N, 0, range(BATCH), BATCH))

    def loss(model, batch, epoch):
        masking = Masking.from_order(draws.permutation(0, Stream.MASK_ORDER, index, N), counts)
        rows = sum(counts)
        t = (draws.uniform(0, Stream.TIMESTEP, index[:1], MUL, rows)[0] * 1000).long()
        noise = draws.normal(0, Stream.NOISE, index[:1], MUL, rows, C)[0]
        value = model(tokens, index, masking, codes, t, noise, keys=index).loss
        return value, {"loss": mean_of(value)}

    engine = LocalEngine(
        model, loss, build_optimizer(model, cfg, lambda name, p: p.ndim > 1), cfg, lambda epoch: 1e-4, place, precision
    )
    return lambda: engine.step([None], 0.0).loss.item()


def head_pass(rows: int) -> Work:
    """Forward and backward of the head on so many rows."""
    model = model_of("none")
    x, z = torch.randn(rows, C, device=find().device), torch.randn(rows, 384, device=find().device)
    t = torch.randint(0, 1000, (rows,), device=find().device)

    def work() -> float:
        eps, v = model.diffloss.net(x, t, z)
        (eps.square().mean() + v.mean()).backward()
        model.zero_grad()
        return eps.sum().item()

    return work


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
    args.out.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
