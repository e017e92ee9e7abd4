"""Every engine on 1, 2 and 4 processes computes what one process computes, and goes on from what any other saved."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mixar.checkpoint import complete_checkpoints
from tests.home import end, fork_ranks

pytestmark = pytest.mark.slow
WORKER = str(Path(__file__).with_name("worker.py"))
ENGINES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
# 30 steps, with dropout, and TI-Mix from the fifth on
COMMON = ["train.batch=32", "train.epochs=15", "train.log_every=1", "train.checkpoint_every=5", "ti_mix.start_epoch=2"]
PASS = {1: 16, 2: 8, 4: 4}  # images: two passes a step everywhere
# under FSDP on two ranks: what is done to the blocks, and how far that may move the weights
BLOCKS = {"recompute=all": 0.0, "recompute=head engine.compile=true": 1e-5}
RESUMED = [  # (engine, ranks) that stopped after 10 steps, and the one that went on
    (("ddp", 2), ("fsdp", 4)), (("fsdp", 4), ("zero3", 2)), (("zero3", 2), ("ddp", 1)), (("hsdp", 4), ("zero1", 1)),
    (("zero2", 2), ("hsdp", 4)), (("ddp", 1), ("zero3", 4)),
    (("ddp", 2), ("ddp", 2)), (("fsdp", 2), ("fsdp", 2)), (("hsdp", 4), ("hsdp", 4)), (("zero1", 2), ("zero1", 2)),
    (("zero2", 2), ("zero2", 2)), (("zero3", 2), ("zero3", 2)),
]  # fmt: skip


def run(root: Path, engine: str, world: int, after: tuple[str, int] | None = None) -> Path:
    return root / ("-".join(map(str, (*after, engine, world))) if after else f"{engine}-{world}")


def launch(home: Path, runs: list[list[str]], world: int, log: Path) -> None:
    """All `runs` in one launch, on two pretended nodes where there are four ranks."""
    ranks = fork_ranks([WORKER, str(home / "config.yaml"), json.dumps(runs)], world, min(world, 2), log)
    assert end(ranks, 400) == [0] * world, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory) -> Path:
    """The folder of all runs: each engine at each size, and those of `RESUMED`."""
    root = tmp_path_factory.mktemp("engines")

    def overrides(folder: Path, engine: str, world: int) -> list[str]:
        return [f"run_dir={folder}", f"engine.name={engine}", f"train.micro_batch={PASS[world]}", *COMMON]

    for world in (1, 2, 4):
        engines = [engine for engine in ENGINES if world > 1 or engine != "hsdp"]
        told = [overrides(run(root, e, world), e, world) for e in engines]
        if world == 2:
            for i, settings in enumerate(BLOCKS):
                told.append([*overrides(root / f"blocks-{i}", "fsdp", 2), *f"engine.{settings}".split()])
        launch(home, told, world, root / f"{world}.log")
    for before, (engine, world) in RESUMED:
        folder = run(root, engine, world, before)
        shutil.copytree(run(root, *before), folder)
        shutil.rmtree(folder / "exports")
        for late in complete_checkpoints(folder)[1:]:  # the run as it was after 10 steps
            shutil.rmtree(late)
    for world in (1, 2, 4):
        again = [
            overrides(run(root, engine, ranks, before), engine, ranks)
            for before, (engine, ranks) in RESUMED
            if ranks == world
        ]
        launch(home, again, world, root / f"{world}-resumed.log")
    return root


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@functools.cache  # most tests compare with the same ones
def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, read by torch's own converter."""
    with tempfile.NamedTemporaryFile() as whole:
        dcp_to_torch_save(checkpoint, whole.name)
        return torch.load(whole.name)


def distance(a: dict, b: dict, part: str) -> float:
    """‖a - b‖ / ‖b‖ over all parameters of `model`, `ema` or a moment."""
    assert set(a) == set(b)
    names = [name for name in b if name.startswith(f"{part}.")]
    return (sum((a[n] - b[n]).square().sum() for n in names) / sum(b[n].square().sum() for n in names)).sqrt().item()


def largest(a: list[dict], b: list[dict], key: str) -> float:
    assert [r["step"] for r in a] == [r["step"] for r in b]
    return max(abs(x[key] - y[key]) / max(abs(y[key]), 1e-9) for x, y in zip(a, b))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_equals_one_process(runs, engine, world) -> None:
    if (engine, world) == ("hsdp", 1):
        pytest.skip("one rank is no mesh of nodes and ranks")
    one, many = run(runs, "ddp", 1), run(runs, engine, world)
    assert len(records(many)) == 30 and records(many)[-1]["ti_mix/generated"] > 0
    assert largest(records(many), records(one), "loss") < 1e-6
    assert largest(records(many), records(one), "optim/grad_norm") < 1e-5
    assert largest(records(many), records(one), "optim/ema_distance") < 1e-5
    for mine, theirs in zip(complete_checkpoints(many), complete_checkpoints(one)):
        found, expected = state(mine), state(theirs)
        assert found["updates"].item() == int(mine.name) / 32
        for part in ("model", "ema", "exp_avg", "exp_avg_sq"):
            assert distance(found, expected, part) < 1e-5, part


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_any_engine_goes_on_from_any_other(runs, before, after) -> None:
    whole, resumed = run(runs, *before), run(runs, *after, before)
    assert "resuming" in (resumed / "log.txt").read_text()
    assert largest(records(resumed)[:11], records(whole)[:11], "loss") < 1e-6  # the first step on what was loaded
    assert largest(records(resumed), records(whole), "loss") < 1e-5
    found, expected = (state(complete_checkpoints(folder)[-1]) for folder in (resumed, whole))
    if before == after:
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    else:
        assert distance(found, expected, "model") < 1e-5 and distance(found, expected, "ema") < 1e-5


@pytest.mark.parametrize("i", range(len(BLOCKS)))
def test_recomputed_and_compiled_blocks_compute_the_same(runs, i) -> None:
    tolerance = [*BLOCKS.values()][i]
    found, plain = (state(complete_checkpoints(folder)[-1]) for folder in (runs / f"blocks-{i}", run(runs, "fsdp", 2)))
    assert distance(found, plain, "model") <= tolerance and distance(found, plain, "ema") <= tolerance
