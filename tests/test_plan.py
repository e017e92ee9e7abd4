"""The plan against real steps on a CPU: what is kept, held and computed; and the plan's own arithmetic."""

import gc
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mixar.__main__ import main
from mixar.cards import CARDS
from mixar.codecs import LatentNorm
from mixar.config import ENGINES, GUIDANCES, PROCESSES, Config, PriorConfig, load_config, to_dict
from mixar.data.batch import Batch
from mixar.dist import Place
from mixar.engine import build_engine
from mixar.engine.native import ReplicatedEngine
from mixar.errors import UserError
from mixar.mixing import masked_counts
from mixar.model import MixAR, attention
from mixar.model.attention import attend
from mixar.model.diffusion import STEPS
from mixar.objectives import MixARObjective
from mixar.plan import make_plan, memory_fixes, render
from mixar.plan.activations import activation_bytes
from mixar.plan.engines import DEEPSPEED_BUCKET, Layout, Sizes, images_a_rank
from mixar.plan.work import FIRST, Tokens, matrices, mean_tokens, prior_flops, prior_share, training_flops
from mixar.prior import Prior
from mixar.weights import write_export

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "mixar_h.md"
PLACE = Place(0, 1, torch.device("cpu"))
TINY = ["model.encoder_width=32", "model.encoder_depth=1", "model.encoder_heads=2", "model.head_depth=1",
        "model.head_width=32"]  # fmt: skip
MIDDLE = ["model.encoder_width=192", "model.encoder_depth=4", "model.head_depth=6", "model.head_width=256",
          "data.image_size=64", "model.grid=8"]  # fmt: skip


def config(*overrides: str) -> Config:
    """The demo's MixAR without a prior, 16 images a batch, with MAR's dropout."""
    fixed = ["ti_mix.enabled=false", "train.batch=16", "model.dropout=0.1"]
    return load_config(ROOT / "configs/demo/mixar.yaml", [*fixed, *overrides])


def paper(name: str, *overrides: str) -> Config:
    return load_config(ROOT / f"configs/{name}.yaml", list(overrides))


def on_meta(cfg: Config) -> MixAR:
    with torch.device("meta"):
        return MixAR(cfg.model)


def objective_of(cfg: Config) -> tuple[MixARObjective, nn.Module]:
    norm = LatentNorm(torch.zeros(cfg.vae.latent_channels), torch.ones(cfg.vae.latent_channels))
    objective = MixARObjective(cfg, norm, PLACE.device)
    model = objective.build().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(objective.initial(name, p))
    return objective, model


def batch_of(cfg: Config, images: int) -> Batch:
    index, side, codes = torch.arange(images), cfg.latent_grid, 2**cfg.tokenizer.bits
    return Batch(
        index, index.tolist(), [str(i) for i in index.tolist()], index % cfg.data.classes,
        moments=torch.randn(images, 2 * cfg.vae.latent_channels, side, side).half(),
        codes=torch.randint(codes, (images, cfg.model.tokens)),
    )  # fmt: skip


def tokens_of(cfg: Config, images: int = 16) -> Tokens:
    """Of the very images that `batch_of` gives, in one pass."""
    counts = masked_counts(cfg.mask, cfg.model.tokens, cfg.seed, range(images), cfg.train.batch)
    return Tokens.of(cfg.model, [cfg.model.tokens - count for count in counts], images)


def layout_of(cfg: Config, gpus: int = 1) -> Layout:
    return Layout(cfg, gpus, Sizes.of(on_meta(cfg)), tokens_of(cfg, images_a_rank(cfg, gpus)), 0)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward on the CPU that keeps what one on CUDA does: byte masks of dropout, norms in float32 under autocast,
    no probabilities of an attention with dropout."""
    norm = F.layer_norm
    monkeypatch.setattr(attention, "attend", lambda *given: attend(*given[:5], 0.0, "auto", None))
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest, **named: norm(x.float(), *rest, **named))


def kept(cfg: Config, images: int) -> int:
    """Bytes of the storages that autograd saves in a forward, parameters left out."""
    objective, model = objective_of(cfg)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # they stay alive, so no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()  # the tensor itself knows its node, which keeps what is packed: a cycle

    batch = batch_of(cfg, images)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), PLACE.autocast(cfg.train.precision):
        loss = objective.loss(model, batch, 0.0)[0]
    assert loss.requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "guidance", "separable"),
    [(TINY, "dc_mix", False), (TINY, "dc_mix", True), *((MIDDLE, name, False) for name in GUIDANCES),
     (MIDDLE, "dc_mix", True), ([*MIDDLE, "model.process=flow"], "dc_mix", False)],
    ids=["tiny", "tiny-separable", *GUIDANCES, "separable", "flow"],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(
    sizes: list[str], guidance: str, separable: bool, precision: str, as_on_cuda
) -> None:
    cfg = config(*sizes, f"model.guidance={guidance}", f"model.separable_adaln={separable}".lower(),
                 f"train.precision={precision}")  # fmt: skip

    def planned(images: int) -> float:
        return images * sum(activation_bytes(cfg.model, tokens_of(cfg, images), precision, "none").values())

    one, two = kept(cfg, 16), kept(cfg, 32)
    assert planned(32) - planned(16) == pytest.approx(two - one, rel=0.01)
    # what does not grow with the batch beyond the plan are autocast's copies of the matrices that a gradient flows
    # through; the final map stays in float32
    uncopied = (*FIRST, "diffloss.net.final_layer.linear.")
    copied = [size for name, size in matrices(on_meta(cfg)).items() if not name.startswith(uncopied)]
    copies = 2 * sum(copied) if precision == "bf16" else 0
    assert 2 * (one - planned(16)) - (two - planned(32)) == pytest.approx(copies, rel=0.001, abs=10)


def test_measuring_what_is_kept_leaves_nothing_behind() -> None:
    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()  # a full run of the tests collects seldom, and grew by gigabytes
    try:
        before = tensors()
        kept(config(*TINY), 16)
        assert tensors() == before
    finally:
        gc.enable()


def test_states_are_what_an_engine_holds_and_their_sum_bounds_a_step(as_on_cuda) -> None:
    cfg = config(*MIDDLE)
    planned = layout_of(cfg).memory("ddp")
    objective, _ = objective_of(cfg)
    engine = build_engine(cfg, objective, PLACE)
    assert isinstance(engine, ReplicatedEngine)
    parameters = list(engine.parameters.values())
    gradients: list[int] = []
    engine.optimizer.register_step_pre_hook(lambda *_: gradients.append(sum(p.grad.nbytes for p in parameters)))
    batch = batch_of(cfg, 16)
    engine.step([batch], 0.0)
    held = {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": gradients[0],
        "adam": sum(value.nbytes for moment in engine.moments.values() for value in moment.values()),
        "ema": sum(value.nbytes for value in engine.ema.values()),
    }
    assert {part: planned[part] for part in held} == held
    assert make_plan(cfg)["memory"] == held | {"total": sum(held.values())}
    peak = peak_of(lambda: engine.step([batch], 0.0)) + sum(held.values()) - held["gradients"]
    assert 1 <= planned["total"] / peak < 1.1


@pytest.mark.parametrize("parts", ["backbone", "head", "all"])
def test_recomputing_is_bounded_by_its_plan(parts: str, as_on_cuda) -> None:
    cfg = config(*MIDDLE, f"engine.recompute={parts}")
    objective, model = objective_of(cfg)
    assert isinstance(model, MixAR)
    backbone, head = [*model.encoder_blocks, *model.decoder_blocks], [*model.diffloss.net.res_blocks]
    for block in {"backbone": backbone, "head": head, "all": backbone + head}[parts]:
        block.forward = lambda *x, forward=block.forward: checkpoint(forward, *x, use_reentrant=False)
    batch = batch_of(cfg, 16)

    def step() -> None:
        with PLACE.autocast(cfg.train.precision):
            loss = objective.loss(model, batch, 0.0)[0]
        loss.backward()

    planned = layout_of(cfg).memory("ddp")
    without = layout_of(config(*MIDDLE)).memory("ddp")["activations"]
    assert planned["activations"] < without
    # gradients come as activations go: the fewer of these are kept, the more the sum exceeds the peak
    planned_step = sum(planned[part] for part in ("gradients", "bf16_copies", "activations"))
    assert 1 <= planned_step / peak_of(step) < 1.6


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that `work` allocates at most at a time."""
    with profile(profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("images", [16, 32], ids=["few-rows", "more-rows-than-timesteps"])
@pytest.mark.parametrize("separable", ["false", "true"])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_flops_are_those_of_a_real_step(guidance: str, separable: str, images: int, process: str) -> None:
    cfg = config(*TINY, f"model.guidance={guidance}", "model.decoder_width=48", "model.decoder_heads=3",
                 "model.decoder_depth=2", "model.dropout=0", f"model.separable_adaln={separable}",
                 f"model.process={process}")  # fmt: skip
    objective, model = objective_of(cfg)
    assert isinstance(model, MixAR)
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective.loss(model, batch_of(cfg, images), 0.0)[0].backward()
    tokens = tokens_of(cfg, images)
    assert (images * tokens.rows > STEPS) == (images == 32), "both sides of the table of timesteps"
    planned = images * sum(training_flops(model, tokens).values())
    assert counter.get_total_flops() == pytest.approx(planned, rel=1e-9)


def test_the_prior_s_flops_are_those_of_a_real_forward() -> None:
    cfg = config()
    prior = Prior(cfg.prior).eval()
    tokens = torch.zeros(2, cfg.model.tokens, cfg.prior.splits, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prior(tokens, torch.zeros(2, dtype=torch.long))
    assert counter.get_total_flops() == 2 * prior_flops(prior)


# MAR's own step computes the last decoder block for all tokens, and embeds condition and timestep of every row. Ours
# spares the unmasked tokens there, 3 of 4 conditions, and timesteps beyond 1000 a pass: 0.400, 1.300 and 1.789 are left
@pytest.mark.parametrize(
    ("name", "mar", "spared"), [("mixar_b", 0.413, 0.013), ("mixar_l", 1.326, 0.026), ("mixar_h", 1.820, 0.031)]
)
def test_flops_of_the_paper_s_models(name: str, mar: float, spared: float) -> None:
    cfg = paper(name)
    assert make_plan(cfg)["flops"]["total"] / 1e12 == pytest.approx(mar - spared, rel=0.01)
    assert mean_tokens(cfg, images=1).masked / 256 == pytest.approx(0.867, abs=0.003)


def test_recomputing_runs_its_blocks_forward_once_more() -> None:
    cfg = config(*MIDDLE)
    model, tokens = on_meta(cfg), tokens_of(cfg)
    plain, again = training_flops(model, tokens), training_flops(model, tokens, "all")
    for part in plain:
        assert 1.25 < again[part] / plain[part] < 4 / 3
    assert training_flops(model, tokens, "head")["backbone"] == plain["backbone"]


def test_the_prior_runs_where_ti_mix_needs_it() -> None:
    assert prior_share(paper("mixar_l")) == 0
    assert prior_share(paper("ti_mix_l")) == 0.5
    assert prior_share(paper("ti_mix_l", "ti_mix.source=shards")) == 0
    assert prior_share(paper("ti_mix_l", "ti_mix.end=1")) == 0
    plan = make_plan(paper("ti_mix_l"), gpus=8)
    assert plan["flops"]["prior"] / 1e12 == pytest.approx(0.163 / 2, rel=0.01)
    assert plan["engines"]["zero3"]["memory"]["prior"] == 4 * 304_929_024, "whole on every rank, outside of the engine"


def test_an_exported_prior_counts_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "prior"
    overrides = [f"prior.weights={folder}", "ti_mix.enabled=true"]
    standard = make_plan(config(*overrides))["flops"]["prior"]
    small = PriorConfig(width=32, depth=1, heads=2, mlp_width=64, bits=8, grid=4, classes=10)
    write_export(folder, "prior", to_dict(small), Prior(small).state_dict())
    assert 0 < make_plan(config(*overrides))["flops"]["prior"] < standard / 1000


def test_who_holds_what() -> None:
    cfg = paper("mixar_h")
    p = 942_515_264
    plan = make_plan(cfg, gpus=64)
    assert plan["passes"] == 1
    memory = {name: engine["memory"] for name, engine in plan["engines"].items()}
    assert {name: m["ema"] / (4 * p) for name, m in memory.items()} == pytest.approx(
        {"ddp": 1, "fsdp": 1 / 64, "hsdp": 1 / 8, "zero1": 1 / 64, "zero2": 1 / 64, "zero3": 1 / 64}
    )
    assert all(m["adam"] == 2 * m["ema"] for m in memory.values())
    whole = {name for name, m in memory.items() if m["weights"] >= 4 * p}
    assert whole == {"ddp", "zero1", "zero2"}
    assert {name for name, m in memory.items() if m["gradients"] >= 4 * p} == {"ddp", "zero1"}
    assert memory["zero3"]["gradients"] == 4 * (-(-p // 64) + DEEPSPEED_BUCKET)
    assert memory["hsdp"]["gathered"] > memory["fsdp"]["gathered"] > memory["ddp"]["gathered"] == 0
    # FSDP keeps accumulated gradients whole
    accumulating = make_plan(cfg, gpus=32)["engines"]
    assert accumulating["fsdp"]["memory"]["gradients"] == accumulating["ddp"]["memory"]["gradients"] == 4 * p


def test_what_a_rank_sends() -> None:
    cfg = config("train.batch=256", "train.micro_batch=16", "train.precision=fp32")
    layout, whole = layout_of(cfg, gpus=16), 4 * sum(p.numel() for p in on_meta(cfg).parameters())
    sizes = layout.sizes
    sent = {"ddp": 2.0, "zero1": 2.0, "zero2": 2.0, "zero3": 3.0, "fsdp": 3 - sizes.root / sizes.parameters}
    for name, times in sent.items():
        moved = layout.moved(name)
        assert sum(moved.values()) == pytest.approx(15 / 16 * times * whole)
        assert moved["across"] == pytest.approx(15 / 16 * times * whole / 8), "what leaves a node, over its 8 GPUs"
    assert layout.moved("hsdp") == pytest.approx({"within": 7 / 8 * 2 * whole, "across": whole / 8})

    twice = layout_of(config("train.batch=512", "train.micro_batch=16", "train.precision=fp32"), gpus=16)
    for name, times in {"ddp": 2, "zero1": 2, "zero2": 3, "zero3": 6}.items():
        assert sum(twice.moved(name).values()) == pytest.approx(15 / 16 * times * whole)
    assert set(layout_of(cfg, gpus=1).moved("fsdp").values()) == {0.0}


def test_the_time_of_a_step() -> None:
    layout, card = layout_of(config("train.batch=32", "train.precision=bf16"), gpus=2), CARDS["a100"]
    work = 16 * 1e12 / (card.bf16 * 0.38)  # the share of mixar_b, compiled
    assert layout.seconds("ddp", {"within": 0.0, "across": 0.0}, 1e12, card) == pytest.approx(work)
    talk = 1e9 / (card.nvlink * 0.8)
    assert layout.seconds("ddp", {"within": 1e9, "across": 0.0}, 1e12, card) == pytest.approx(work + 0.3 * talk)
    talk = 1e12 / (card.network * 0.8)
    assert layout.seconds("ddp", {"within": 0.0, "across": 1e12}, 1e12, card) == pytest.approx(talk), (
        "work hides behind it"
    )
    plan = make_plan(paper("mixar_h"), gpus=64)
    ddp = plan["engines"]["ddp"]
    assert ddp["images_per_second"] * ddp["step_seconds"] == pytest.approx(2048)
    assert ddp["days"] * 86400 == pytest.approx(plan["steps"] * ddp["step_seconds"])


@pytest.mark.parametrize(
    ("gpus", "overrides", "chosen"),
    [
        (1, [], ("ddp", "ddp")),
        (8, [], ("fsdp", "zero3")),
        (32, [], ("hsdp", "zero3")),
        (32, ["engine.name=zero2"], ("zero2", "zero2")),
    ],
)
def test_the_engine_of_a_run(gpus: int, overrides: list[str], chosen: tuple[str, str]) -> None:
    layout = layout_of(paper("mixar_h", *overrides), gpus)
    assert (layout.engine("torchrun"), layout.engine("deepspeed")) == chosen


@pytest.mark.parametrize(
    ("gpus", "overrides", "told"),
    [
        (12, [], "--gpus 12 does not fill nodes of 8: write --gpus 16"),
        (0, [], "write --gpus 8"),
        (48, [], "train.batch=2048 does not divide over 48 ranks: write train.batch=2064"),
        (256, [], "does not divide the micro-batch 8 on 256 ranks: write mask.group=8, or train.batch=4096"),
        (256, ["train.micro_batch=null"], "does not divide the micro-batch 8 on 256 ranks: write mask.group=8"),
    ],
)
def test_a_layout_that_cannot_be_is_told_with_what_to_write(gpus: int, overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan(paper("mixar_h", *overrides), gpus=gpus)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("name", "gpus", "micro"), [("mixar_l", 64, 32), ("mixar_b", 32, 64), ("mixar_h", 128, 16), ("mixar_l", 8, 64)]
)
def test_more_gpus_take_smaller_micro_batches(name: str, gpus: int, micro: int) -> None:
    plan = make_plan(paper(name), gpus=gpus)
    assert plan["micro_batch"] == micro and gpus * micro * plan["passes"] == 2048


def test_only_mixar_is_laid_out() -> None:
    with pytest.raises(UserError, match="leave --gpus out"):
        make_plan(paper("prior_14bit"), gpus=8)


def test_what_does_not_fit_is_told_with_what_would() -> None:
    crowded = ["train.batch=2560", "train.micro_batch=80", "mask.group=16"]
    cfg = paper("mixar_h", *crowded)
    plan = make_plan(cfg, gpus=8)
    ddp = plan["engines"]["ddp"]
    assert not ddp["fits"] and "images_per_second" not in ddp and plan["engines"]["fsdp"]["fits"]
    told = render(plan)
    assert f"does not fit: {ddp['memory']['total'] / 1e9:.0f} of 80 GB" in told
    fixes = re.findall(r"\S+=\S+", next(line for line in told.splitlines() if "ddp would fit with" in line))
    assert {fix.split("=")[0] for fix in fixes} == {"train.micro_batch", "engine.recompute", "engine.name"}
    for fix in fixes:
        fixed = make_plan(paper("mixar_h", *crowded, fix), gpus=8)
        assert fixed["engines"][fixed["chosen"]["torchrun"] if "name" in fix else "ddp"]["fits"], fix
    assert make_plan(cfg, gpus=8, card="h200")["engines"]["ddp"]["fits"]


@pytest.mark.parametrize(
    ("overrides", "memory", "keys"),
    [
        ([], math.inf, "train.micro_batch engine.recompute engine.name"),
        (
            [],
            80e9,
            "train.micro_batch engine.recompute engine.name",
        ),  # less than now, though that would fit as reckoned
        ([], 34e9, "engine.recompute"),
        ([], 20e9, ""),
        (["engine.recompute=all"], 80e9, "train.micro_batch engine.name"),
        (["train.micro_batch=16"], 80e9, "engine.recompute engine.name"),  # a mask group
    ],
)
def test_what_needs_less_memory_than_a_run_that_has_too_little(overrides: list[str], memory: float, keys: str) -> None:
    def total(*more: str) -> int:
        cfg = paper("mixar_h", "engine.name=ddp", *overrides, *more)
        return make_plan(cfg, gpus=8)["engines"][cfg.engine.name]["memory"]["total"]

    fixes = memory_fixes(paper("mixar_h", *overrides), 8, "ddp", memory)
    assert [fix.split("=")[0] for fix in fixes] == keys.split()
    assert all(total(fix) < total() and total(fix) <= memory for fix in fixes), fixes


def test_only_mixar_s_memory_is_reckoned() -> None:
    assert memory_fixes(paper("prior_14bit"), 8, "ddp", math.inf) == []


def test_the_command_line_lays_out_a_run(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", "configs/mixar_h.yaml", "--gpus", "32", "--gpu", "a100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["engines"]) == list(ENGINES) and plan["parameters"] == 942_515_264
    assert main(["plan", "configs/mixar_h.yaml", "--gpus", "32", "--gpu", "a100"]) == 0
    told = capsys.readouterr().out
    assert "torchrun and srun take hsdp, the deepspeed launcher takes zero3" in told
    assert all(f"\n  - {line}\n" in told + "\n" for line in plan["assumptions"])
    assert "312 TFLOP/s" in told and "44% (zero3 34%)" in told


def blocks(text: str) -> list[tuple[str, str]]:
    """The commands shown on a page, and what it says they print."""
    return re.findall(r"```\n\$ mixar (.+)\n((?:.*\n)*?)```\n", text)


@pytest.mark.parametrize(("command", "shown"), blocks(PAGE.read_text()))
def test_the_page_shows_what_the_commands_print(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    # a run's weights are not here: it shows its plan, then tells which are missing
    assert main(command.split()) == (2 if "--dry-run" in command else 0)
    printed = capsys.readouterr().out
    cut = shown.removeprefix("...\n")
    assert printed.endswith(cut) and (cut != shown or printed == shown)


def test_the_page_s_table_is_what_the_plan_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^\| `(--gpus .+?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 5
    for options, cells in rows:
        assert main(["plan", "configs/mixar_h.yaml", "--json", *options.split()]) == 0
        plan = json.loads(capsys.readouterr().out)
        name = plan["chosen"]["torchrun"]
        engine = plan["engines"][name]
        layout = f"{plan['nodes']} | {name} | {plan['micro_batch']} x {plan['passes']}"
        speed = f"{engine['images_per_second']:,.0f} | {24 * engine['days']:.0f}"
        assert cells == f"{layout} | {engine['memory']['total'] / 1e9:.1f} | {speed}", options
    assert any("--dry-run" in command for command, _ in blocks(PAGE.read_text()))
