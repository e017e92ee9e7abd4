"""The codecs' training: the same losses and gradients however a batch is divided into passes and over ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mixar.checkpoint import complete_checkpoints
from mixar.codecs import load_tokenizer, load_vae
from mixar.config import load_config
from mixar.weights import newest_export
from tests.home import end, fork_ranks, save_features

pytestmark = pytest.mark.slow
WORKER = str(Path(__file__).parents[1] / "engine" / "worker.py")
# two steps of 8 images; the entropies weigh as much as the reconstruction
COMMON = ["train.batch=8", "train.epochs=0.25", "train.log_every=1", "train.checkpoint_every=0.125", "optim.lr=1e-3",
          "optim.warmup_epochs=0", "tokenizer.entropy_weight=1", "ti_mix.enabled=false"]  # fmt: skip
WHOLE = ("ddp", 1, 8)
DIVIDED = [("ddp", 1, 4), ("ddp", 1, 2), ("ddp", 2, 4), ("ddp", 2, 2), ("fsdp", 2, 4), ("fsdp", 2, 2), ("zero2", 2, 2),
           ("zero3", 2, 4), ("zero3", 2, 2)]  # fmt: skip
TASKS = {
    "tokenizer": ["task=tokenizer"],
    "vae": ["task=vae"],
    "vq": ["task=tokenizer", "tokenizer.kind=vq", "tokenizer.code_dim=4"],
    **{
        f"judged-{kind}": [
            f"task={kind}", "data.image_size=32", f"{kind}.perceptual_weight=0.5", f"{kind}.discriminator_weight=0.3",
            f"{kind}.perceptual_features={{root}}/features", f"{kind}.discriminator_width=4",
        ]
        for kind in ("vae", "tokenizer")
    },
}  # fmt: skip
JUDGED = [("ddp", 1, 2), ("ddp", 2, 2), ("fsdp", 2, 2), ("zero1", 2, 2), ("zero2", 2, 2), ("zero3", 2, 2)]
PARTS = {task: JUDGED if task.startswith("judged") else DIVIDED for task in TASKS}
RESUMED = [("ddp", 1, 2), ("fsdp", 2, 2), ("zero3", 2, 2)]  # of the judged VAE, after the first of two steps


def folder(root: Path, task: str, engine: str, world: int, micro: int) -> Path:
    return root / f"{task}-{engine}-{world}-{micro}"


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory) -> Path:
    """The folder of all runs, named by `folder`."""
    root = tmp_path_factory.mktemp("codecs")
    save_features(root / "features", 32)
    for task, divided in PARTS.items():
        launch(home, root, [(task, *part) for part in (WHOLE, *divided)])
    shutil.copytree(root / "features", root / "again" / "features")
    resumed = [("judged-vae", *part) for part in RESUMED]
    for run in resumed:
        again = shutil.copytree(folder(root, *run), folder(root / "again", *run))
        shutil.rmtree(again / "exports")
        shutil.rmtree(complete_checkpoints(again)[-1])
    launch(home, root / "again", resumed)
    return root


def launch(home: Path, root: Path, runs: list[tuple[str, str, int, int]]) -> None:
    """Train `runs`, those of as many ranks in one launch."""
    for ranks in (1, 2):
        told = [
            [*(text.format(root=root) for text in TASKS[task]), f"run_dir={folder(root, task, engine, world, micro)}",
             f"engine.name={engine}", f"train.micro_batch={micro}", *COMMON]
            for task, engine, world, micro in runs
            if world == ranks
        ]  # fmt: skip
        log = root / f"{ranks}.log"
        processes = fork_ranks([WORKER, str(home / "config.yaml"), json.dumps(told)], ranks, None, log)
        assert end(processes, 400) == [0] * ranks, log.read_text()[-4000:]


def found(run: Path, tmp_path: Path, checkpoint: int = 0) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a run logged, and all of a checkpoint; the moments in the first are the first step's gradients."""
    dcp_to_torch_save(complete_checkpoints(run)[checkpoint], tmp_path / "whole.pt")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], torch.load(tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("task", "engine", "world", "micro"), [(task, *part) for task, divided in PARTS.items() for part in divided]
)
def test_a_divided_batch_is_the_whole_one(runs, tmp_path, task, engine, world, micro) -> None:
    whole, expected = found(folder(runs, task, *WHOLE), tmp_path)
    divided, state = found(folder(runs, task, engine, world, micro), tmp_path)
    parts = ["kl"] if task.endswith("vae") else ["avg_entropy", "per_sample_entropy"]
    parts += ["perceptual", "adversarial", "discriminator"] if task.startswith("judged") else []
    for name in ("loss", "loss/reconstruction", *(f"loss/{part}" for part in parts)):
        assert divided[0][name] == pytest.approx(whole[0][name], rel=1e-5), name
        assert divided[1][name] == pytest.approx(whole[1][name], rel=1e-3), name
    assert divided[0]["optim/grad_norm"] == pytest.approx(whole[0]["optim/grad_norm"], rel=1e-4)
    names = [name for name in expected if name.startswith("exp_avg.")]
    size = sum(expected[name].square().sum() for name in names).sqrt()
    assert sum((state[name] - expected[name]).square().sum() for name in names).sqrt() < 1e-4 * size


@pytest.mark.parametrize(("engine", "world", "micro"), RESUMED)
def test_a_judged_run_resumes_bit_for_bit(runs, tmp_path, engine, world, micro) -> None:
    whole, expected = found(folder(runs, "judged-vae", engine, world, micro), tmp_path, -1)
    resumed = folder(runs / "again", "judged-vae", engine, world, micro)
    lines, state = found(resumed, tmp_path, -1)
    assert "resuming" in (resumed / "log.txt").read_text() and lines[-1]["loss"] == whole[-1]["loss"]
    assert any(name.startswith("exp_avg.discriminator.") for name in expected)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["vae", "tokenizer"])
def test_the_export_is_the_codec_alone(runs, kind) -> None:
    load = {"vae": load_vae, "tokenizer": load_tokenizer}[kind]
    runs = [folder(runs, task, "fsdp", 2, 2) for task in (kind, f"judged-{kind}")]
    plain, judged = (load(getattr(load_config(None, [f"{kind}.weights={run}"]), kind)) for run in runs)
    assert judged.state_dict().keys() == plain.state_dict().keys()
    about = json.loads((newest_export(runs[1]) / "config.json").read_text())["config"]
    assert about["perceptual_features"] is None and about["discriminator_weight"] == 0.3
