"""Runs of earlier versions: tests/old/run was written before attention went by level and DONE had all files' sums."""

import shutil
from pathlib import Path

from mixar.config import load_config
from mixar.train import train
from mixar.weights import is_export
from tests.home import records

OLD = Path(__file__).parents[1] / "old" / "run"  # of a VAE on the images of tests/home, stopped after 2 steps


def test_an_old_run_resumes(home, tmp_path: Path) -> None:
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    before = records(run)
    now = ["task=vae", "vae.width=4", "vae.attention_levels=[-1]", "train.epochs=1.25", f"run_dir={run}"]
    train(load_config(home / "config.yaml", now))
    log = (run / "log.txt").read_text()
    assert "000000000032: step 2, 32 images" in log and "vae.attention" not in log, "the same geometry"
    assert records(run)[: len(before)] == before and records(run)[-1]["step"] == 5
    assert is_export(run / "exports" / "80-ema")
