"""The codecs' training: the same losses and gradients however a batch is divided into passes and over ranks."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mixar.checkpoint import complete_checkpoints
from tests.home import end, fork_ranks

pytestmark = pytest.mark.slow
WORKER = str(Path(__file__).parents[1] / "engine" / "worker.py")
# two steps of 8 images; the entropies weigh as much as the reconstruction
COMMON = ["train.batch=8", "train.epochs=0.25", "train.log_every=1", "train.checkpoint_every=0.125", "optim.lr=1e-3",
          "optim.warmup_epochs=0", "tokenizer.entropy_weight=1", "ti_mix.enabled=false"]  # fmt: skip
WHOLE = ("ddp", 1, 8)
DIVIDED = [("ddp", 1, 4), ("ddp", 1, 2), ("ddp", 2, 4), ("ddp", 2, 2), ("fsdp", 2, 4), ("fsdp", 2, 2), ("zero2", 2, 2),
           ("zero3", 2, 4), ("zero3", 2, 2)]  # fmt: skip
TASKS = {"tokenizer": [], "vae": [], "vq": ["task=tokenizer", "tokenizer.kind=vq", "tokenizer.code_dim=4"]}


def folder(root: Path, task: str, engine: str, world: int, micro: int) -> Path:
    return root / f"{task}-{engine}-{world}-{micro}"


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory) -> Path:
    """The folder of all runs, named by `folder`."""
    root = tmp_path_factory.mktemp("codecs")
    for ranks in (1, 2):
        told = [
            [*(overrides or [f"task={task}"]), f"run_dir={folder(root, task, engine, world, micro)}",
             f"engine.name={engine}", f"train.micro_batch={micro}", *COMMON]
            for task, overrides in TASKS.items()
            for engine, world, micro in (WHOLE, *DIVIDED)
            if world == ranks
        ]  # fmt: skip
        log = root / f"{ranks}.log"
        processes = fork_ranks([WORKER, str(home / "config.yaml"), json.dumps(told)], ranks, None, log)
        assert end(processes, 400) == [0] * ranks, log.read_text()[-4000:]
    return root


def found(run: Path, tmp_path: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a run logged, and all of its first checkpoint, whose moments are the first step's gradients."""
    dcp_to_torch_save(complete_checkpoints(run)[0], tmp_path / "whole.pt")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], torch.load(tmp_path / "whole.pt")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("engine", "world", "micro"), DIVIDED)
def test_a_divided_batch_is_the_whole_one(runs, tmp_path, task, engine, world, micro) -> None:
    whole, expected = found(folder(runs, task, *WHOLE), tmp_path)
    divided, state = found(folder(runs, task, engine, world, micro), tmp_path)
    parts = ["kl"] if task == "vae" else ["avg_entropy", "per_sample_entropy"]
    for name in ("loss", "loss/reconstruction", *(f"loss/{part}" for part in parts)):
        assert divided[0][name] == pytest.approx(whole[0][name], rel=1e-5), name
        assert divided[1][name] == pytest.approx(whole[1][name], rel=1e-3), name
    assert divided[0]["optim/grad_norm"] == pytest.approx(whole[0]["optim/grad_norm"], rel=1e-4)
    names = [name for name in expected if name.startswith("exp_avg.")]
    size = sum(expected[name].square().sum() for name in names).sqrt()
    assert sum((state[name] - expected[name]).square().sum() for name in names).sqrt() < 1e-4 * size
