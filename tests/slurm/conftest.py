"""A real Slurm cluster of three virtual nodes for the whole session, and what a run needs: images, codecs, a config."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixar.codecs import VAE, build_tokenizer
from mixar.config import load_config, to_dict
from mixar.evaluation.classifier import save_classifier, train_classifier
from mixar.weights import write_export

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

CONFIG = """
run_dir: {root}/run
data: {{images: {root}/images, shards: {root}/shards, image_size: 16, classes: 2, workers: 0}}
vae: {{weights: {root}/vae, width: 16, multipliers: [1, 1, 1], blocks: 1, attention_levels: [], latent_channels: 3}}
tokenizer: {{weights: {root}/tokenizer, width: 16, multipliers: [1, 1, 1], blocks: 1, bits: 6}}
model:
  {{guidance: none, grid: 4, class_tokens: 2, encoder_width: 32, encoder_depth: 1, encoder_heads: 2, head_depth: 1,
    head_width: 32}}
mask: {{group: 8}}
optim: {{lr: 0.02, warmup_epochs: 0.5, ema: 0.9}}
train:
  {{epochs: 30, batch: 16, micro_batch: 8, precision: fp32, log_every: 10, checkpoint_every: 5, samples_every: 0}}
sample: {{steps: 2, diffusion_steps: "4"}}
"""


@dataclass(frozen=True)
class Cluster:
    """The cluster, and what its jobs say."""

    env: dict[str, str]
    logs: Path

    def __call__(self, *command: str | Path, **variables: str) -> str:
        """What cluster.sh prints; the jobs that it submits get the variables."""
        done = subprocess.run(
            [CLUSTER, *command], cwd=ROOT, env=self.env | variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *arguments: str | Path, **variables: str) -> str:
        """sbatch in the repository; the job's id."""
        output = f"--output={self.logs}/%j.log"
        return self("run", "sbatch", "--parsable", output, *arguments, **variables).split()[-1]

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What Slurm knows of a job: one dict, or one an element of an array."""
        lines = self("run", "scontrol", "show", "job", "-o", job).splitlines()
        return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines if line]

    def log(self, job: str) -> str:
        file = self.logs / f"{job}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, what: str, condition: Callable[[], object], job: str, seconds: float = 180) -> None:
        """Until the condition holds; fails when it does not in time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"{what} did not happen in {seconds:g} s: {self.jobs(job)}\n{self.log(job)[-4000:]}")
            time.sleep(0.3)

    def finish(self, job: str, seconds: float = 180) -> dict[str, str]:
        """What Slurm knows of a job that has ended, restarts included."""
        self.wait("the end", lambda: all(j["JobState"] in ENDED for j in self.jobs(job)), job, seconds)
        return self.jobs(job)[0]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge iproute2")
    if os.geteuid() != 0:
        pytest.skip("root alone can start a cluster")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o711)  # munge wants its socket within reach of all
    env = os.environ | {
        "CLUSTER_DIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MAX_RESTARTS": "3",
    }
    found = Cluster(env, tmp_path_factory.mktemp("logs"))
    try:
        found("up", "3")
        yield found
    finally:
        found("down")


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """64 images of two classes, codecs and a classifier with random weights, and the config of a run of 120 steps."""
    root = tmp_path_factory.mktemp("home")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        path = root / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (root / "config.yaml").write_text(CONFIG.format(root=root))
    cfg = load_config(root / "config.yaml")
    torch.manual_seed(0)
    for kind, network in (("vae", VAE(cfg.vae)), ("tokenizer", build_tokenizer(cfg.tokenizer))):
        write_export(root / kind, kind, to_dict(getattr(cfg, kind)) | {"weights": None}, network.state_dict())
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(64) % 2
    save_classifier(root / "classifier", *train_classifier(images, labels, 2, steps=2))
    return root
