"""The run directory: what lies where, checkpoints that are complete or not there, and one run at a time.

config.yaml env.json log.txt metrics.jsonl tb/ replay/ checkpoints/<images>/ exports/<images>-ema/ samples/ eval/
"""

import fcntl
import json
import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mixar.config import Config, load_config, to_dict, to_yaml
from mixar.engine import Engine
from mixar.errors import UserError
from mixar.metrics import log, start_log

DONE = "DONE"
FORMAT = 1
# what shapes the weights, the draws or the count of images: a resumed run must not change these keys and sections
FIXED = ("task", "seed", "train.batch", "vae", "tokenizer", "prior", "model")


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    images: int = 0


class RunDirectory:
    """One run's folder.

    Raises:
        UserError: another process trains here, or the config differs from the run's in what cannot change.
    """

    def __init__(self, cfg: Config) -> None:
        self.path = Path(cfg.run_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
        except OSError as error:
            raise UserError(
                f"run_dir={self.path} cannot be written ({error.strerror}): write run_dir=<a folder you own>"
            ) from None
        start_log(self.path / "log.txt")
        self._check(cfg)
        (self.path / "config.yaml").write_text(to_yaml(cfg))
        (self.path / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")

    def _take(self) -> IO[str]:
        lock = (self.path / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {self.path}: wait for it, or write run_dir=<another folder>"
            ) from None
        return lock

    def _check(self, cfg: Config) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        before, now = to_dict(load_config(file)), to_dict(cfg)
        for key, old, new in _differences(before, now):
            if (key in FIXED or key.split(".")[0] in FIXED) and not key.endswith(".weights"):
                raise UserError(
                    f"{file} was started with {key}={old}, now it is {new}: write {key}={old}, or another run_dir"
                )
            if key != "run_dir":
                log.info("%s was %s, from here on it is %s", key, old, new)

    def save(self, engine: Engine, progress: Progress, keep: int) -> Path:
        """Write a checkpoint aside, mark it DONE, rename it into place, and drop the oldest beyond `keep`."""
        folder = self.path / "checkpoints"
        final, aside = folder / f"{progress.images:012d}", folder / f".{progress.images:012d}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        engine.save(aside)
        (aside / "progress.json").write_text(
            json.dumps({"format": FORMAT, "step": progress.step, "images": progress.images})
        )
        (aside / DONE).touch()
        _sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.path)

    def load(self, engine: Engine) -> Progress:
        """Load the newest complete checkpoint; passes over torn ones and those of another format, naming them."""
        for folder in reversed(self.checkpoints()):
            try:
                saved = json.loads((folder / "progress.json").read_text())
                if saved["format"] != FORMAT:
                    raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
                engine.load(folder)
            except (CheckpointException, OSError, ValueError, KeyError) as error:  # an older one may still be whole
                log.info("passing over %s: %s", folder, _reason(error))
                continue
            log.info("resuming from %s: step %d, %d images", folder, saved["step"], saved["images"])
            return Progress(saved["step"], saved["images"])
        return Progress()

    def export_path(self, images: int) -> Path:
        return export_path(self.path, images)

    def write_replay(self, step: int, record: dict[str, Any]) -> Path:
        """What is needed to see a skipped step again."""
        file = self.path / "replay" / f"step-{step}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n")
        return file


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of the run directory `run`, oldest first. Their names are the numbers of images seen."""
    return sorted(done.parent for done in (run / "checkpoints").glob(f"[0-9]*/{DONE}"))


def export_path(run: Path, images: int) -> Path:
    """Where the run directory `run` keeps the export of its EMA weights after `images` images."""
    return run / "exports" / f"{images}-ema"


def load_ema(checkpoint: Path, model: nn.Module) -> None:
    """Put a checkpoint's EMA weights, and its buffers, into `model`. Nothing else of it is read, and no run is touched.

    Raises:
        UserError: a damaged checkpoint, or one of another model.
    """
    averaged = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {f"{'ema' if name in averaged else 'model'}.{name}": value for name, value in model.state_dict().items()}
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)  # in place
    except (CheckpointException, OSError) as error:
        raise UserError(
            f"{checkpoint} cannot be read ({_reason(error)}): remove it, then the one before it is taken"
        ) from None


def _reason(error: BaseException) -> str:
    """Why a checkpoint cannot be read, in one line; CheckpointException wraps what a damaged file raises, by rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200]


def environment() -> dict[str, Any]:
    """Versions, machine and command line of this process."""
    packages = [
        "mixar",
        "torch",
        "torchvision",
        "deepspeed",
        "mosaicml-streaming",
        "numpy",
        "omegaconf",
        "torch-fidelity",
    ]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key, new in now.items():
        old = before.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename after it never names empty ones."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
