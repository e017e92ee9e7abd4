"""`make bench`: each row is a ratio of two times, measured in turn in this process, so that the machine cancels out.

Width 384, 6+6 blocks, head 3 x 512, token dim 32, 256 positions, batch 8, dropout 0.1; `reference` is the algorithm of
benchmarks/reference.py. Operators are compared with compositions of torch's own, at their sizes in training; their rows
end with the peak of allocated bytes relative to the output. On a GPU the paper's models follow, with images/s and the
model FLOP/s utilisation (MFU). Writes bench.json.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from reference import MAR, Training
from streaming import MDSWriter

from mixar import rng
from mixar.cards import find_card
from mixar.config import (
    GUIDANCES,
    PRESETS,
    Config,
    MaskConfig,
    ModelConfig,
    PriorConfig,
    SampleConfig,
    TrainConfig,
    load_config,
)
from mixar.data.loader import Loader, ShardSource
from mixar.data.parts import HASH
from mixar.dist import Place, find
from mixar.engine import build_engine
from mixar.environment import environment
from mixar.mixing import Masking, masked_counts
from mixar.model import MixAR, init_weights, initial_value
from mixar.objectives.base import mean_of
from mixar.ops import mix_gather, timestep_embed
from mixar.ops.mix_gather import reference as mix_gather_reference
from mixar.ops.timestep_embed import reference as timestep_reference
from mixar.plan import make_plan
from mixar.prior import Prior, keyed_draws, sample_codes
from mixar.rng import Stream
from mixar.sampling import sample_tokens
from mixar.sampling.autoregressive import compiled_step, diffusion_step
from mixar.sampling.reordered import reorder_linears

CONFIGS = Path(__file__).parents[1] / "configs"
BATCH, N, C, WIDTH, BLOCKS, HEADS, HEAD = 8, 256, 32, 384, 6, 6, (3, 512)
Work = Callable[[], object]


def config_of(guidance: str) -> ModelConfig:
    sizes = {"encoder_width": WIDTH, "encoder_depth": BLOCKS, "encoder_heads": HEADS}
    return ModelConfig(
        guidance=guidance, grid=16, latent_channels=C, code_bits=14, code_dim=None, classes=1000, dropout=0.1,
        head_depth=HEAD[0], head_width=HEAD[1], **sizes,
        **{name.replace("encoder", "decoder"): value for name, value in sizes.items()},
    )  # fmt: skip


class FixedData:
    """MixAR on fixed data, including all random numbers."""

    def __init__(self, cfg: ModelConfig, images: int, device: torch.device) -> None:
        self.cfg, self.index = cfg, torch.arange(images, device=device)
        self.tokens = rng.normal(0, Stream.POSTERIOR, self.index, cfg.tokens, cfg.token_dim)
        codes = rng.bits(0, Stream.PRIOR_TOKEN, self.index, cfg.tokens) & (2**cfg.code_bits - 1)
        self.codes = None if cfg.guidance == "none" else codes
        self.counts = sorted(masked_counts(MaskConfig(group=BATCH), cfg.tokens, 0, range(images), images))

    def build(self) -> torch.nn.Module:
        return MixAR(self.cfg)

    def initial(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return initial_value(name, like, 0)

    def decays(self, name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim > 1

    def loss(self, model, batch, epoch):
        index, rows, mul = self.index, sum(self.counts), self.cfg.diffusion_batch_mul
        masking = Masking.from_order(rng.permutation(0, Stream.MASK_ORDER, index, self.cfg.tokens), self.counts)
        t = (rng.uniform(0, Stream.TIMESTEP, index[:1], mul, rows)[0] * 1000).long()
        noise = rng.normal(0, Stream.NOISE, index[:1], mul, rows, self.cfg.token_dim)[0]
        value = model(self.tokens, index, masking, self.codes, t, noise, keys=index).loss
        return value, {"loss": mean_of(value)}


def training_step(cfg: Config, images: int = BATCH) -> Work:
    """One optimizer step."""
    place = Place(0, 1, find().device)
    engine = build_engine(cfg, FixedData(cfg.model, images, place.device), place)
    return lambda: engine.step([None], 0.0).loss.item()


def small_step(guidance: str, precision: str) -> Work:
    """One optimizer step of the small model."""
    return training_step(Config(model=config_of(guidance), train=TrainConfig(precision=precision)))


def reference_model() -> MAR:
    model = MixAR(config_of("none"))
    init_weights(model, 0)
    reference = MAR(WIDTH, BLOCKS, HEADS, *HEAD, C)
    reference.load_state_dict(model.state_dict())
    return reference.to(find().device)


def reference_step() -> Work:
    """One optimizer step of the reference, in float32."""
    training, device = Training(reference_model()), find().device
    tokens, labels = torch.randn(BATCH, N, C, device=device), torch.arange(BATCH, device=device)
    return lambda: training.step(tokens, labels)


def reference_sampling(steps: int, diffusion_steps: int) -> Work:
    """Sampling of a batch of tokens by the reference, with guidance, in float32."""
    model, labels = reference_model().eval(), torch.arange(BATCH, device=find().device)
    return lambda: model.sample(labels, steps, diffusion_steps, 3.0)[0, 0, 0].item()


def sampling(
    settings: SampleConfig, precision: str, compiled: bool = False, guidance: str = "none", images: int = BATCH
) -> Work:
    """Sampling of a batch of continuous tokens, after the discrete ones if there is a guidance."""
    device = find().device
    with torch.device(device):
        model, prior = MixAR(config_of(guidance)).eval(), None
        if guidance != "none":
            sizes = {"width": WIDTH, "depth": BLOCKS, "heads": HEADS, "mlp_width": 4 * WIDTH}
            prior = Prior(PriorConfig(**sizes, bits=14, grid=16, classes=1000)).eval()
    init_weights(model, 0)
    if not compiled:  # as in the pipeline
        reorder_linears(torch.nn.ModuleList([model] if prior is None else [model, prior]))
    seeds, run = torch.arange(images, device=device), compiled_step(device) if compiled else diffusion_step

    def work() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            codes = None
            if prior is not None:
                codes = sample_codes(prior, seeds, settings, *keyed_draws(seeds, N, prior.config.splits))
            return sample_tokens(model, seeds, codes, seeds, settings, run)[0, 0, 0].item()

    return work


def loading(folder: str) -> Work:
    """The next batch of a loader over shards with the model's sizes."""
    columns = {"moments": f"ndarray:float16:2,{2 * C},16,16", "codes": f"ndarray:uint16:2,{N}"}
    columns |= {"label": "int", "key": "str"}
    source = np.random.default_rng(0)
    with MDSWriter(out=folder, columns=columns, hashes=[HASH]) as writer:
        for i in range(512):
            moments = source.standard_normal((2, 2 * C, 16, 16)).astype(np.float16)
            codes = source.integers(2**14, size=(2, N), dtype=np.uint16)
            writer.write({"moments": moments, "codes": codes, "label": i, "key": str(i)})
    batches = iter(Loader(ShardSource(folder), 0, BATCH, BATCH, 0, 1, workers=1, flip=True))
    return lambda: next(batches).to(find().device)


def head_pass(rows: int) -> Work:
    """Forward and backward pass of the head on `rows` rows."""
    model = MixAR(config_of("none"))
    init_weights(model, 0)
    model.to(find().device)
    x, z = torch.randn(rows, C, device=find().device), torch.randn(rows, WIDTH, device=find().device)
    t = torch.randint(0, 1000, (rows,), device=find().device)

    def work() -> float:
        eps, v = model.diffloss.net(x, t, z)
        (eps.square().mean() + v.mean()).backward()
        model.zero_grad()
        return eps.sum().item()

    return work


def mix_gather_passes(batch: int, width: int) -> dict[str, tuple[Work, Work]]:
    """Forward and backward pass of mix_gather with TI-Mix, compiled and composed of torch's operators."""
    place, prefix = find().device, 64
    index = torch.arange(batch, device=place)
    counts = masked_counts(MaskConfig(group=batch), N, 0, range(batch), batch)
    slots = Masking.from_order(rng.permutation(0, Stream.MASK_ORDER, index, N), counts).slots(prefix)
    codes, drawn = (rng.bits(0, stream, index, N) & (2**14 - 1) for stream in (Stream.PRIOR_TOKEN, Stream.PRIOR_FILL))
    rho, share = rng.uniform(0, Stream.RHO, index, N), torch.full((1,), 0.5, device=place)
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
    """The peak of bytes that `work` allocates in addition to those before."""
    if find().device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints its stages between the rows
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def operator_rows(rounds: int) -> list[dict]:
    """Time and peak memory of each compiled operator relative to its composition; peaks also relative to the output."""
    rows = []
    for batch, width in ((32, 1024), (BATCH, WIDTH)):
        output = 4 * batch * (64 + N) * width
        for direction, works in mix_gather_passes(batch, width).items():
            row = ratio(f"mix_gather {direction}: compiled / composed, {batch} x {width}", *works, rounds, (20, 20))
            rows.append(row | {"peak / output": [peak(work) / output for work in works]})
    works = timestep_passes(28_416)
    row = ratio("timestep_embed: compiled / composed, 28,416 rows", *works, rounds, (20, 20))
    rows.append(row | {"peak / output": [peak(work) / (4 * 28_416 * 256) for work in works]})
    for row in rows:
        compiled, composed = row["peak / output"]
        print(f"{row['row']:55} peak {compiled:.2f} over {composed:.2f} of the output")
    return rows


def model_rows(rounds: int) -> list[dict]:
    """The paper's models on this GPU: images/s of consecutive steps, and MFU in bf16."""
    device = find().device
    if device.type != "cuda":
        return []
    card = find_card(torch.cuda.get_device_name(device))
    rows = []
    for name in ("mixar_b", "mixar_l", "mixar_h"):
        cfg = load_config(CONFIGS / f"{name}.yaml", ["engine.name=ddp", "engine.compile=true"])
        images = cfg.train.micro_batch or BATCH
        step, found = training_step(cfg, images), []
        step(), step()
        for _ in range(rounds):
            begun = time.perf_counter()
            step()
            found.append(images / (time.perf_counter() - begun))
        rate = statistics.median(found)
        row = {"row": f"step: {name}, {images} images", "images/s": rate, "low": min(found), "high": max(found)}
        if card is not None:
            row["mfu"] = rate * make_plan(cfg)["flops"]["total"] / card.bf16
        print(f"{row['row']:55} {rate:6.0f} images/s   MFU {row.get('mfu', float('nan')):.1%}", flush=True)
        rows.append(row)
        del step
        torch.cuda.empty_cache()
    return rows


def ratio(name: str, numerator: Work, denominator: Work, rounds: int, times: tuple[int, int] = (1, 1)) -> dict:
    """Time of `numerator` over time of `denominator`, timed in turn; the median and the range over the rounds.

    Args:
        times: runs of each per round, of which the mean counts.
    """
    numerator(), denominator()
    found = []
    for _ in range(rounds):
        seconds = []
        for work, count in zip((numerator, denominator), times):
            begun = time.perf_counter()
            for _ in range(count):
                work()
            seconds.append((time.perf_counter() - begun) / count)
        found.append(seconds[0] / seconds[1])
    row = {"row": name, "ratio": statistics.median(found), "low": min(found), "high": max(found), "rounds": rounds}
    print(f"{name:55} {row['ratio']:6.2f}   {row['low']:.2f} to {row['high']:.2f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="per row; sampling, which takes long, has at most 3")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    rounds, few = args.rounds, min(args.rounds, 3)
    print(f"{'time of ... over time of ...':55} {'median':>6}   range over {rounds} rounds, {few} of sampling")
    plain, half, rows = small_step("none", "fp32"), small_step("none", "bf16"), []
    for guidance in GUIDANCES[1:]:
        rows.append(ratio(f"step: {guidance} / none, fp32", small_step(guidance, "fp32"), plain, rounds))
    rows.append(ratio("step: fp32 / bf16, none", plain, half, rounds))
    reference = reference_step()
    rows.append(ratio("step: reference / ours, fp32", reference, plain, rounds))
    rows.append(ratio("step: reference / ours in bf16", reference, half, rounds))
    with tempfile.TemporaryDirectory() as folder:
        rows.append(ratio("batch: loader, one worker / step in bf16", loading(folder), half, rounds, (64, 1)))
    masked = round(0.867 * N) * BATCH
    rows.append(ratio("head: all rows / masked rows, fp32", head_pass(N * BATCH), head_pass(masked), rounds))
    rows += operator_rows(rounds)
    slow, short = reference_sampling(8, 25), SampleConfig(steps=8, diffusion_steps="25")
    for precision in ("fp32", "bf16"):
        rows.append(ratio(f"sampling 8 x 25: reference / exact in {precision}", slow, sampling(short, precision), few))
        if find().device.type == "cuda":
            ours = sampling(short, precision, compiled=True)
            rows.append(ratio(f"sampling 8 x 25: reference / exact in {precision}, CUDA graph", slow, ours, few))
    by_preset = {
        name: sampling(SampleConfig(**preset), "bf16", guidance="dc_mix", images=2) for name, preset in PRESETS.items()
    }
    for name in ("fast", "fastest"):
        rows.append(ratio(f"2 images with the prior: exact / {name}, bf16", by_preset["exact"], by_preset[name], few))
    rows += model_rows(rounds)
    args.out.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
