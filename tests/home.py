"""What runs need to be tried on: a small set of shards with its frozen networks, and several processes."""

import json
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mixar.codecs import VAE, build_tokenizer, load_tokenizer, load_vae
from mixar.config import Config, load_config, to_dict, to_yaml
from mixar.data.images import open_images
from mixar.data.shards import prepare
from mixar.evaluation.classifier import Classifier, ClassifierConfig, save_classifier
from mixar.prior import Prior
from mixar.weights import read_export, write_export

ROOT = Path(__file__).resolve().parents[1]
# a process that has imported what training needs, which takes seconds, and that others are forked from
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mixar.train", "deepspeed"])
CONFIG = """
run_dir: {root}/run
data: {{images: {root}/images, shards: {root}/shards, image_size: 16, classes: 2, workers: 0}}
vae: {{weights: {root}/vae, width: 16, multipliers: [1, 1, 1], blocks: 1, attention_levels: [], latent_channels: 3}}
tokenizer: {{weights: {root}/tokenizer, width: 16, multipliers: [1, 1, 1], blocks: 1, bits: 6}}
prior: {{weights: {root}/prior, width: 16, depth: 1, heads: 2, mlp_width: 32}}
model:
  {{grid: 4, class_tokens: 2, encoder_width: 32, encoder_depth: 1, encoder_heads: 2, head_depth: 1, head_width: 32}}
mask: {{group: 4}}
ti_mix: {{enabled: true, start_epoch: 0.5, duration_epochs: 2}}
optim: {{lr: 0.02, warmup_epochs: 0.5, ema: 0.9}}
train:
  {{epochs: 2.5, batch: 16, micro_batch: 8, precision: fp32, log_every: 2, checkpoint_every: 1.25, samples_every: 0}}
sample: {{steps: 2, diffusion_steps: "4", prior_steps: 2}}
"""


def make_sources(root: Path, *overrides: str) -> Config:
    """64 images of two classes, codecs and a prior with random weights, and the config of a run of 10 steps."""
    rng = np.random.default_rng(0)
    for i in range(64):
        path = root / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    (root / "config.yaml").write_text(CONFIG.format(root=root))
    cfg = load_config(root / "config.yaml", list(overrides))
    if overrides:
        (root / "config.yaml").write_text(to_yaml(cfg))
    torch.manual_seed(0)
    networks = {"vae": VAE(cfg.vae), "tokenizer": build_tokenizer(cfg.tokenizer), "prior": Prior(cfg.prior)}
    for kind, network in networks.items():
        write_export(root / kind, kind, to_dict(getattr(cfg, kind)) | {"weights": None}, network.state_dict())
    return cfg


def make_home(root: Path) -> Path:
    """The sources, and shards of them."""
    cfg = make_sources(root)
    prepare(cfg, open_images(cfg.data), load_vae(cfg.vae), load_tokenizer(cfg.tokenizer), "cpu", progress=False)
    return root


def save_features(folder: Path, size: int, seed: int = 0) -> None:
    """The export of a classifier of images of `size` pixels, with random weights, for a perceptual loss."""
    torch.manual_seed(seed)
    save_classifier(folder, Classifier(ClassifierConfig(2, size, widths=[4, 8], features=8)), accuracy=0.5)


def train_arguments(home: Path, run: Path, *overrides: str) -> list[str]:
    """What follows `python` to train the config of a home in the folder `run`."""
    return [str(ROOT / "mixar" / "train.py"), str(home / "config.yaml"), f"run_dir={run}", *overrides]


def records(run: Path) -> list[dict]:
    """What a run logged, without a last line that is being written."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def exported_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in the only export of a run."""
    (export,) = (run / "exports").iterdir()
    return read_export(export, "mixar")[1]


def free_port() -> int:
    """A port that is free, below those that the kernel hands out by itself: between probe and use it would."""
    while True:
        port = random.randrange(10000, 15000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def rank_environments(world: int, local: int | None = None) -> list[dict[str, str]]:
    """What a launcher gives each rank; with `local` ranks a node, more than one node is pretended."""
    local = local or world
    port = str(free_port())
    return [
        {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % local),
            "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }
        for rank in range(world)
    ]  # fmt: skip


def start_ranks(
    arguments: Sequence[str], world: int, local: int | None = None, log: Path | None = None,
    start_new_session: bool = False, **env: str,
) -> list[subprocess.Popen]:  # fmt: skip
    """`python ARGUMENTS` as so many ranks; what they say goes to `log`."""
    out = subprocess.DEVNULL if log is None else log.open("a")
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | place | env, stdout=out, stderr=subprocess.STDOUT,
            cwd=ROOT, start_new_session=start_new_session,
        )
        for place in rank_environments(world, local)
    ]  # fmt: skip


class Forked:
    """`python ARGUMENTS` in a process that need not import again what training needs; as Popen, as far as `end` asks.

    What tests signals, launchers or the names of processes takes `start_ranks`.
    """

    def __init__(self, arguments: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.process = FORKS.Process(target=_run_as_program, args=(list(arguments), env, log))
        self.process.start()
        self.kill = self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def _run_as_program(arguments: list[str], env: dict[str, str], log: Path) -> None:
    with log.open("a") as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a program that python starts
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    os.chdir(ROOT)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def fork_ranks(arguments: Sequence[str], world: int, local: int | None, log: Path) -> list[Forked]:
    """Ranks as by `start_ranks`, forked."""
    log.touch()
    return [Forked(arguments, dict(os.environ | place), log) for place in rank_environments(world, local)]


def fork_alone(arguments: Sequence[str], log: Path) -> Forked:
    """`python ARGUMENTS` without a launcher, forked."""
    log.touch()
    return Forked(arguments, os.environ | {"OMP_NUM_THREADS": "1"}, log)


def end(processes: Sequence[subprocess.Popen | Forked], seconds: float = 120) -> list[int | None]:
    """Wait as a launcher does: when one rank fails, the others are ended. The exit statuses."""
    limit = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            limit = min(limit, time.monotonic() + 2)  # the others may be about to tell what they saw
        if time.monotonic() > limit:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return [process.wait() for process in processes]
