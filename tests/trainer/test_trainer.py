"""Whole runs on real shards: they learn, they resume bit for bit after a kill, and they say what is wrong."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixar.__main__ import main
from mixar.config import load_config
from mixar.errors import UserError
from mixar.train import train
from mixar.weights import read_export
from tests.home import end, exported_weights, fork_alone, fork_ranks, records, train_arguments

pytestmark = pytest.mark.slow


def config(home: Path, run: Path, *overrides: str):
    return load_config(home / "config.yaml", [f"run_dir={run}", *overrides])


def train_apart(home: Path, run: Path) -> None:
    log = run.with_name(f"{run.name}.log")
    assert end([fork_alone(train_arguments(home, run), log)]) == [0], log.read_text()[-3000:]


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> Path:
    """A run of 10 steps that nothing interrupted, in a process of its own: other threads give other rounding."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train_apart(home, run)
    return run


def test_a_run_leaves_what_the_contract_says(whole) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "env.json", "log.txt", "metrics.jsonl", "tb", "checkpoints", "exports"} <= names
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["000000000080", "000000000160"]
    assert (whole / "exports" / "160-ema" / "config.json").is_file()
    last = records(whole)[-1]
    assert last["step"] == 10 and last["images"] == 160
    wanted = {"loss", "optim/lr", "optim/grad_norm", "optim/ema_distance"}
    wanted |= {"speed/images_per_second", "speed/seconds_per_step", "speed/data_wait"}
    wanted |= {"ti_mix/lambda", "ti_mix/generated"}
    assert wanted <= set(last)
    assert any(name.startswith("loss/t") for name in last) and any(name.startswith("loss/mask") for name in last)
    board = EventAccumulator(str(whole / "tb"))
    board.Reload()
    assert set(board.Tags()["scalars"]) >= wanted
    for event in board.Scalars("loss"):
        (line,) = [r for r in records(whole) if r["step"] == event.step]
        assert event.value == pytest.approx(line["loss"], rel=1e-6)


def test_ti_mix_takes_over_as_lambda_falls(whole) -> None:
    by_step = {r["step"]: r for r in records(whole)}
    assert by_step[2]["ti_mix/lambda"] == 1.0 and by_step[2].get("ti_mix/generated", 0) == 0
    assert by_step[10]["ti_mix/lambda"] < 0.25
    assert by_step[10]["ti_mix/generated"] == pytest.approx(1 - by_step[10]["ti_mix/lambda"], abs=0.1)


def test_ten_steps_equal_five_a_kill_and_five(home, whole, tmp_path) -> None:
    run = tmp_path / "killed"
    process = fork_alone(train_arguments(home, run), tmp_path / "log")
    checkpoint = run / "checkpoints" / "000000000080" / "DONE"
    while not checkpoint.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.005)
    process.kill()
    process.wait()
    (run / "checkpoints" / ".000000000160.partial").mkdir(exist_ok=True)  # as a kill in the middle of saving leaves it
    shutil.rmtree(run / "exports", ignore_errors=True)  # should the kill have come late
    shutil.rmtree(run / "checkpoints" / "000000000160", ignore_errors=True)
    train_apart(home, run)
    assert "resuming" in (run / "log.txt").read_text()
    resumed, uninterrupted = exported_weights(run), exported_weights(whole)
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    untimed = lambda r: {k: v for k, v in r.items() if k != "time" and not k.startswith("speed/")}
    assert [untimed(r) for r in records(run)] == [untimed(r) for r in records(whole)]
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [r["step"] for r in records(run)]


def test_a_run_goes_on_where_each_rank_has_less_than_a_micro_batch(home, whole, tmp_path) -> None:
    run, log = tmp_path / "wider", tmp_path / "log"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "exports")
    shutil.rmtree(run / "checkpoints" / "000000000160")
    assert end(fork_ranks(train_arguments(home, run), 4, None, log)) == [0] * 4, log.read_text()[-3000:]
    told = (run / "log.txt").read_text()
    assert "resuming" in told and "batch 16 = 4 per pass x 4 ranks x 1 passes" in told
    assert "train.micro_batch=8 is the most per pass: 4 divide the 4 images of each rank" in told
    for name, value in exported_weights(whole).items():
        torch.testing.assert_close(exported_weights(run)[name], value, rtol=1e-4, atol=1e-5)


def test_a_torn_checkpoint_is_passed_over(home, whole, tmp_path) -> None:
    run = tmp_path / "torn"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "exports")
    data = next((run / "checkpoints" / "000000000160").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    train_apart(home, run)
    assert "skipping" in (run / "log.txt").read_text()
    assert all(torch.equal(exported_weights(run)[name], value) for name, value in exported_weights(whole).items())


def test_a_second_run_in_the_same_folder_is_refused(home, tmp_path) -> None:
    run = tmp_path / "busy"
    process = fork_alone(train_arguments(home, run, "train.epochs=1000"), tmp_path / "log")
    try:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(UserError, match="another process is training"):
            train(config(home, run))
    finally:
        process.kill()
        process.wait()


def test_what_shapes_a_run_cannot_change_in_it(home, whole, tmp_path) -> None:
    run = tmp_path / "changed"
    shutil.copytree(whole, run)
    with pytest.raises(UserError, match=r"model\.head_width=32.*now it is 48"):
        train(config(home, run, "model.head_width=48"))
    with pytest.raises(UserError, match=r"train\.batch=16.*now it is 32"):
        train(config(home, run, "train.batch=32"))
    train(config(home, run, "train.epochs=3", "model.attention=math"))
    told = (run / "log.txt").read_text()
    assert "train.epochs changes from 2.5 to 3" in told and "scaled_dot_product_attention (math)" in told
    assert "cpu operators" in told
    assert (run / "exports" / "192-ema").is_dir()


def test_bad_data_stops_the_run_and_names_it(home, tmp_path) -> None:
    run = tmp_path / "nan"
    with pytest.raises(UserError, match="steps in a row were not finite"):
        train(config(home, run, "optim.lr=1e30", "optim.clip=0", "optim.warmup_epochs=0", "train.max_skips=2"))
    assert all(np.isfinite(r["loss"]) for r in records(run))  # the skipped steps are left out of the means
    replays = sorted((run / "replay").iterdir())
    assert len(replays) > 2
    replay = json.loads(replays[0].read_text())
    known = {path.relative_to(home / "images").as_posix() for path in (home / "images").rglob("*.png")}
    assert len(replay["keys"]) == 16 and set(replay["keys"]) <= known


@pytest.mark.parametrize("guidance", ["none", "dc_sa", "dc_ca"])
def test_every_guidance_trains(home, tmp_path, guidance) -> None:
    mix = [] if guidance != "none" else ["ti_mix.enabled=false"]
    train(config(home, tmp_path / guidance, f"model.guidance={guidance}", "train.epochs=0.5", *mix))
    assert len(records(tmp_path / guidance)) == 1


def test_pre_drawn_tokens_need_no_prior_in_the_step(home, tmp_path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(home / "shards", shards)
    told = [f"data.shards={shards}", "ti_mix.variants=2"]
    assert main(["prepare", str(home / "config.yaml"), "--pre-draw", *told]) == 0
    mix = ["ti_mix.source=shards", "ti_mix.start_epoch=0", "ti_mix.schedule=constant", "prior.weights=null"]
    train(config(home, tmp_path / "run", *told, *mix))
    assert all(r["ti_mix/generated"] == 1 and np.isfinite(r["loss"]) for r in records(tmp_path / "run"))


def test_the_prior_and_the_codecs_learn(home, tmp_path) -> None:
    for task in ("prior", "vae", "tokenizer"):
        run = tmp_path / task
        train(config(home, run, f"task={task}", "train.epochs=10", "optim.lr=0.03", "ti_mix.enabled=false"))
        losses = [r["loss"] for r in records(run)]
        assert losses[-1] < 0.95 * losses[0], task
        assert read_export(next((run / "exports").iterdir()), task)


def test_bf16_follows_fp32(home, whole, tmp_path) -> None:
    run = tmp_path / "bf16"
    train(config(home, run, "train.precision=bf16"))
    for a, b in zip(records(run), records(whole)):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


def test_init_from_takes_what_fits(home, whole, tmp_path) -> None:
    run = tmp_path / "tuned"
    export = next((whole / "exports").iterdir())
    train(config(home, run, f"init_from={export}", "train.epochs=0.25", "model.head_depth=2", "optim.lr=0"))
    log = (run / "log.txt").read_text()
    assert "loaded" in log and "new (diffloss.net.res_blocks.1" in log
    assert torch.equal(exported_weights(run)["z_proj.weight"], exported_weights(whole)["z_proj.weight"])


def test_previews_are_the_same_seeds(home, tmp_path) -> None:
    run = tmp_path / "previews"
    train(config(home, run, "train.epochs=1", "train.samples_every=0.5"))
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    assert [event.step for event in board.Images("samples")] == [2, 4]


@pytest.mark.parametrize("launcher", ["python", "python -m", "torchrun", "deepspeed"])
def test_each_launcher_runs_train(home, tmp_path, launcher) -> None:
    programs = Path(sys.executable).parent
    file = str(Path(__file__).resolve().parents[2] / "mixar" / "train.py")
    start = {
        "python": [sys.executable, file],
        "python -m": [sys.executable, "-m", "mixar.train"],
        "torchrun": [str(programs / "torchrun"), "--standalone", "--nproc_per_node=1", file],
        "deepspeed": [str(programs / "deepspeed"), "--num_gpus=1", file],
    }[launcher]
    done = subprocess.run(
        [*start, str(home / "config.yaml"), f"run_dir={tmp_path / 'run'}", "train.epochs=0.25"], cwd=tmp_path,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert records(tmp_path / "run")[-1]["images"] == 16


def test_a_mistake_is_one_line(home) -> None:
    command = [sys.executable, "-m", "mixar", "train", str(home / "config.yaml"), "model.guidence=none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mixar train: ")]
    assert "Did you mean 'model.guidance'?" in line and "Traceback" not in done.stderr
