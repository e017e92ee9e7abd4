"""Each check of a GPU, run on the CPU: it passes, and sees a planted fault."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixar import rng
from mixar.config import Config
from mixar.gpu import compiled, operators, profiling, ranks, sampling, waits
from mixar.gpu.draws import random_numbers
from mixar.gpu.findings import Finding
from mixar.gpu.ranks import take_steps
from mixar.gpu.synthetic import SyntheticObjective, changed, modes
from mixar.objectives import MixARObjective

CPU = torch.device("cpu")
MODES = ["as configured", "guidance none", "guidance dc_mix", "guidance dc_sa", "guidance dc_ca", "ratio_scope batch",
         "TI-Mix online", "TI-Mix from shards"]  # fmt: skip


OPERATORS = ["mix_gather", "timestep_embed", "gated_add", "random"]


def bad(findings: Any) -> dict[str, str]:
    return {finding.name: finding.text for finding in findings if finding.status != "ok"}


def every_second(function: Callable[..., Any], fault: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function` with a fault in its odd calls: a check asks the device first, then the CPU."""
    calls = [0]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        out = function(*args, **kwargs)
        return fault(out) if calls[0] % 2 else out

    return faulty


def test_random_numbers(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = random_numbers(cfg, CPU)
    assert found.status == "ok" and len(found.figures) == 7
    monkeypatch.setattr(rng, "normal", every_second(rng.normal, lambda x: x + 1e-3))
    (found,) = random_numbers(cfg, CPU)
    assert found.text == "normal are further from the CPU's than 1e-05"
    monkeypatch.undo()
    monkeypatch.setattr(rng, "bits", every_second(rng.bits, lambda x: x ^ 1))
    (found,) = random_numbers(cfg, CPU)
    assert "bits are not the CPU's" in found.text and "normal" not in found.text


def test_operators(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "LARGE", 2**21)
    found = list(operators.operators(cfg, CPU))
    names = [f"operators: {name}, {where}" for where in ("last card", "side stream") for name in OPERATORS]
    assert bad(found) == {}
    assert [finding.name for finding in found] == ["operators: kernels", *names, "operators: beyond 2^31 elements"]


def shifted(x: torch.Tensor) -> torch.Tensor:
    """What a kernel gives that is off by one element."""
    return x.flatten().roll(1).view_as(x)


@pytest.mark.parametrize("name", ["mix_gather", "timestep_embed", "gated_add"])
def test_a_kernel_that_is_off_by_one_is_seen(cfg: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = getattr(operators, name)
    monkeypatch.setattr(operators, "LARGE", 2**21)
    monkeypatch.setattr(operators, name, lambda *args, **kwargs: shifted(kernel(*args, **kwargs)))
    found = bad(operators.operators(cfg, CPU))
    wrong = [f"operators: {name}, last card", f"operators: {name}, side stream", "operators: beyond 2^31 elements"]
    assert [*found] == wrong and all("times as far off as rounding allows" in text for text in found.values())


def test_random_numbers_on_a_wrong_stream_are_seen(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "LARGE", 2**21)
    monkeypatch.setattr(rng, "bits", every_second(rng.bits, torch.zeros_like))
    assert [*bad(operators.operators(cfg, CPU))] == ["operators: random, last card", "operators: random, side stream"]


def test_an_index_that_overflows_is_seen(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the end of a large output is wrong: no small one has that many elements."""
    kernel, limit = operators.mix_gather, 2**20

    def overflowing(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = kernel(*args, **kwargs)
        late = (torch.arange(out.numel()) >= limit).view_as(out)
        return out.masked_fill(late, 0.0)

    monkeypatch.setattr(operators, "LARGE", 2**21)
    monkeypatch.setattr(operators, "mix_gather", overflowing)
    assert [*bad(operators.operators(cfg, CPU))] == ["operators: beyond 2^31 elements"]


def test_no_step_waits(cfg: Config) -> None:
    found = list(waits.waits(changed(cfg, ti_mix={"enabled": True, "start_epoch": 0.0}), CPU))
    assert bad(found) == {} and [finding.name for finding in found] == [f"waits: {mode}" for mode in MODES]


def test_a_value_that_is_read_is_seen(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = MixARObjective.loss

    def reading(self: Any, *args: Any) -> Any:
        value, scalars = loss(self, *args)
        return value * (value.detach().item() > 0), scalars

    monkeypatch.setattr(MixARObjective, "loss", reading)
    found = bad(waits.waits(cfg, CPU))
    assert len(found) == len(MODES) and all("a value is read in step" in text for text in found.values())


def test_a_mode_that_fails_leaves_the_others(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(cfg: Config, *args: Any) -> Any:
        if cfg.model.guidance == "dc_sa":
            raise RuntimeError("no kernel for that")
        return batch_of(cfg, *args)

    batch_of = waits.batch_of
    monkeypatch.setattr(waits, "batch_of", failing)
    ((name, text),) = bad(waits.waits(cfg, CPU)).items()
    assert name == "waits: guidance dc_sa" and "RuntimeError in mixar/gpu/waits.py:" in text
    assert text.endswith("no kernel for that")


def test_modes_are_what_they_are_named_after(cfg: Config) -> None:
    forms = modes(cfg)
    assert {form.model.guidance for form in forms.values()} == {"none", "dc_mix", "dc_sa", "dc_ca"}
    assert forms["ratio_scope batch"].mask.ratio_scope == "batch"
    assert {name for name, form in forms.items() if form.ti_mix.enabled} == {
        "as configured", "TI-Mix online", "TI-Mix from shards"
    }  # fmt: skip
    drawing = SyntheticObjective(forms["TI-Mix online"], CPU)
    assert drawing.prior is not None and SyntheticObjective(forms["guidance none"], CPU).prior is None


@pytest.mark.slow
def test_compiled_steps(cfg: Config) -> None:
    form = modes(changed(cfg, model={"dropout": 0.0}))
    good = compiled.compare("good", form["TI-Mix online"], CPU, 5)
    assert good.status == "ok" and good.figures["graphs"] > 0, good


@pytest.mark.slow
def test_faults_of_compiled_steps_are_seen(cfg: Config, quick_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    form = modes(changed(cfg, model={"dropout": 0.0}))
    # lengths change from step to step, and on a CPU nothing pads them: the step is compiled again and again
    again = compiled.compare("again", form["ratio_scope batch"], CPU, 5)
    assert again.status == "bad" and "recompiles" in again.text
    with monkeypatch.context() as patch:
        patch.setattr("mixar.config.EngineConfig.compiles", lambda *_: False)
        assert compiled.compare("never", form["as configured"], CPU, 4).text == "nothing was compiled"

    def wrong(self: Any, *args: Any) -> Any:
        value, scalars = loss(self, *args)
        return value * (1.001 if self.cfg.engine.compile else 1.0), scalars

    loss = MixARObjective.loss
    monkeypatch.setattr(MixARObjective, "loss", wrong)
    off = compiled.compare("wrong", form["as configured"], CPU, 4)
    assert "the loss is" in off.text and "the gradient norm is" not in off.text


def test_the_profile_of_a_step(cfg: Config) -> None:
    found = profiling.measure("eager", cfg, CPU, False)
    figures = found.figures
    assert found.status == "ok" and figures["images"] == 16 and figures["kernels"] > 1000
    assert 0 < figures["host, ms"] <= figures["step, ms"] and 0 <= figures["idle share"] < 1
    times = [entry["ms"] for entry in figures["longest"]]
    assert len(times) == 10 and times == sorted(times, reverse=True) and sum(times) <= figures["device, ms"]
    without = profiling.measure("eager", changed(cfg, model={"dropout": 0.0}), CPU, False)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in without.figures["attention"]
    assert figures["attention"] == [], "with dropout by image, attention on a CPU is spelled out"


FLASH, FMHA = "void pytorch_flash::flash_fwd_kernel<...>", "fmha_cutlassF_f32_aligned_64x64_rf_sm80"


@pytest.mark.parametrize(
    ("attention", "precision", "ran", "right"),
    [
        ("auto", "bf16", [FLASH], True), ("auto", "bf16", [FMHA], False), ("auto", "fp32", [FMHA], True),
        ("auto", "fp32", [], False), ("math", "bf16", [], True), ("fa3", "bf16", [FLASH], True),
        ("cudnn", "bf16", ["cudnn_generated_fort_native_sdpa_sm90"], True), ("cudnn", "bf16", [FLASH], False),
    ],
)  # fmt: skip
def test_the_attention_kernel_is_the_one_asked_for(
    cfg: Config, attention: str, precision: str, ran: list[str], right: bool
) -> None:
    asking = changed(cfg, model={"attention": attention}, train={"precision": precision})
    assert (profiling.attention_faults(asking, ran) == []) is right


def test_more_memory_than_planned_is_a_fault() -> None:
    assert profiling.memory_faults(99, 100) == []
    assert profiling.memory_faults(120, 100) == ["the peak is 1.20 of the planned memory"]


@pytest.mark.slow
def test_sampling(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    same, speed = sampling.sampling(cfg, CPU, 3)
    assert same.status == speed.status == "ok", (same, speed)
    assert speed.figures["compiled, s per image"] > 0 and same.figures["standard deviation, levels"] > 1
    pipeline = sampling.MixARPipeline

    class Faulty(pipeline):
        """A compiled step that works on the image before."""

        def _draw_tokens(self, labels: Any, seeds: Any, codes: Any) -> Any:
            tokens = super()._draw_tokens(labels, seeds, codes)
            return tokens.roll(1, 0) if self.compiled else tokens

        def __init__(self, *args: Any, compile: bool) -> None:
            super().__init__(*args)
            self.compiled = compile

    monkeypatch.setattr(sampling, "MixARPipeline", Faulty)
    same, _ = sampling.sampling(cfg, CPU, 3)
    assert same.status == "bad" and "compiled images differ by up to" in same.text


@pytest.mark.slow
def test_engines(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(ranks.engines(cfg, CPU, ("ddp", "hsdp", "zero3")))
    assert bad(found) == {} and [finding.name for finding in found] == [
        "engines: ddp", "engines: hsdp", "engines: zero3"
    ]  # fmt: skip
    slower = lambda cfg, *rest: take_steps(changed(cfg, optim={"lr": cfg.optim.lr / 2}), *rest)
    monkeypatch.setattr(ranks, "take_steps", slower)
    ((name, text),) = bad(ranks.engines(cfg, CPU, ("fsdp",))).items()
    assert name == "engines: fsdp" and "the weights differ by" in text and "the loss differ" in text
    monkeypatch.setenv("MIXAR_OPS", "none")  # the ranks end with an error
    monkeypatch.setattr(ranks, "take_steps", lambda *_: {})
    (ended,) = ranks.engines(cfg, CPU, ("ddp",))
    assert ended.status == "bad" and ended.text == "the ranks ended with status 1"
    assert any("MIXAR_OPS=none is not known" in line for line in ended.figures["output"])


def test_one_card_has_no_second_rank(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = list(ranks.engines(cfg, torch.device("cuda", 0)))
    assert found == [Finding("engines", "not run", "it takes 2 cards, and there is one")]


def test_too_little_memory_for_the_large_case_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 8 << 30))
    found = operators._beyond(torch.device("cuda", 0), 1024, 2**31)
    assert found.status == "not run" and found.text == "it takes 20 GiB of the card's memory, and 4 GiB are free"
