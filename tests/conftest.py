"""A whole model with random weights, small enough to sample from in a blink."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from mixar.codecs import VAE, LatentNorm, build_tokenizer
from mixar.config import ModelConfig, PriorConfig, SampleConfig, TokenizerConfig, VAEConfig
from mixar.model import MixAR, init_weights
from mixar.prior import Prior
from mixar.sampling import MixARPipeline
from tests.home import make_home

# under nohup, and in the background of a shell, these are ignored, also by the runs that tests send them to
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

MODEL = ModelConfig(
    grid=8, latent_channels=4, code_bits=4, code_dim=None, classes=3, class_tokens=2, head_depth=1, head_width=32,
    encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2,
)  # fmt: skip
VAE_16 = VAEConfig(width=16, multipliers=[1, 2], blocks=1, attention_levels=[], latent_channels=4)
TOKENIZER = TokenizerConfig(width=16, multipliers=[1, 2], blocks=1, bits=4)
PRIOR = PriorConfig(width=32, depth=1, heads=2, mlp_width=64, bits=4, splits=2, grid=8, classes=3)
SETTINGS = SampleConfig(steps=4, diffusion_steps="4", cfg_scale=2.0, prior_steps=4, batch=4)


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., MixARPipeline]:
    """Pipelines of 16x16 images in three classes; the arguments are the model's guidance and its head's process."""

    def make(guidance: str = "dc_mix", process: str = "ddpm") -> MixARPipeline:
        torch.manual_seed(0)
        guided = guidance != "none"
        model = MixAR(ModelConfig(**{**vars(MODEL), "guidance": guidance, "process": process}))
        init_weights(model, 0)
        vae, tokenizer, prior = VAE(VAE_16).eval(), build_tokenizer(TOKENIZER).eval(), Prior(PRIOR).eval()
        for network in (model, prior):  # they start with zeros where they end: the same whatever they are asked for
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
        norm = LatentNorm(torch.linspace(-1, 1, 4), torch.linspace(1, 2, 4))
        return MixARPipeline(
            model, vae, norm, prior if guided else None, tokenizer if guided else None, SETTINGS, "cpu", "fp32"
        )

    return make


@pytest.fixture(scope="session")
def release(make_pipeline, tmp_path_factory):
    """The export folder of a pipeline."""
    return make_pipeline().save_pretrained(tmp_path_factory.mktemp("release") / "tiny", images=7)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The root of a small training set with its config; nobody changes what is in it."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder that holds mixar as `pip install` leaves it, from a wheel: put it on PYTHONPATH, outside of a clone."""
    root = Path(__file__).parents[1]
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("mixar", "configs", "csrc"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, *wheels.glob("*.whl")], check=True)
    return site


@pytest.fixture(scope="session")
def demo(installed, tmp_path_factory) -> tuple[Path, str]:
    """A folder that is no clone, in which the wheel's `mixar demo --short` has left runs/demo; what it printed."""
    folder = tmp_path_factory.mktemp("outside")
    command = [sys.executable, "-m", "mixar", "demo", "--short", "--out", "runs/demo"]
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.fixture
def quick_compiler(monkeypatch) -> None:
    """torch.compile without the C++ compiler, which takes most of its time: when it compiles again is the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
