"""The reports of a run: TensorBoard, metrics.jsonl with the same scalars, and a console line per interval.

A scalar's name begins with its group. TensorBoard sorts groups by name and opens the first two: loss, then memory on a
GPU and optim on a CPU; speed and ti_mix follow.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from mixar import files
from mixar.config import Config, to_yaml, value_of
from mixar.log import log

RENAMED = {  # names of scalars in runs of earlier versions
    "lr": "optim/lr", "grad_norm": "optim/grad_norm", "ema_distance": "optim/ema_distance",
    "images_per_second": "speed/images_per_second", "data_wait": "speed/data_wait",
    "reconstruction": "loss/reconstruction", "kl": "loss/kl", "commitment_loss": "loss/commitment",
    "codebook_loss": "loss/codebook", "entropy_loss": "loss/entropy",
    "per_sample_entropy": "loss/per_sample_entropy", "avg_entropy": "loss/avg_entropy",
}  # fmt: skip
CHARTS = {  # of the page of custom scalars: patterns of the scalars in each, also by their names in earlier versions
    "loss, by timestep": ["^loss(/t[0-9].*)?$"],
    "gradient norm": ["^(optim/)?grad_norm$"],
    "images per second": ["^(speed/)?images_per_second$"],
}
# keys in TensorBoard's table of hyperparameters, which shows the first five by name; all are in the config's text
HYPERPARAMETERS = (
    "task", "seed", "model.guidance", "model.process", "ti_mix.enabled", "optim.lr", "optim.weight_decay",
    "optim.warmup_epochs", "optim.ema", "train.batch", "train.epochs", "train.precision",
)  # fmt: skip
FINAL = ("loss", "optim/grad_norm", "speed/images_per_second")  # scalars whose last value that table shows


class Metrics:
    """Writes to `run_dir`/tb and `run_dir`/metrics.jsonl.

    Args:
        device: whose memory is reported, unless it is a CPU.
        step: the step after which a run resumes. Later lines are removed, since the run writes them again.
        images: number of images seen at that step.
        total: number of images of the whole run, for the remaining time.
    """

    def __init__(self, run_dir: Path, cfg: Config, device: torch.device, step: int, images: int, total: int) -> None:
        self.path, self.device, self.total = run_dir / "metrics.jsonl", device, total
        if self.path.exists():
            kept = [line for line in self.path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
            files.write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(run_dir / "tb"), purge_step=step + 1)
        self._describe(cfg, step)
        self._since = (time.monotonic(), step, images)
        self._rate = 0.0

    def _describe(self, cfg: Config, step: int) -> None:
        """Write the page of charts, the config as text, and the hyperparameters, into the same event file."""
        self.board.add_custom_scalars({"training": {title: ["Multiline", tags] for title, tags in CHARTS.items()}})
        self.board.add_text("config", "".join(f"    {line}\n" for line in to_yaml(cfg).splitlines()), step)
        of_mixar = ("model.", "ti_mix.")
        keys = [key for key in HYPERPARAMETERS if cfg.task == "mixar" or not key.startswith(of_mixar)]
        # SummaryWriter.add_hparams would begin a second run beside this one
        self._hparams = hparams({key: value_of(cfg, key) for key in keys}, dict.fromkeys(FINAL))
        for summary in self._hparams[:2]:
            self.board._get_file_writer().add_summary(summary)

    def write(self, step: int, images: int, scalars: dict[str, float], seconds: dict[str, float]) -> None:
        """Report an interval: its mean scalars, and its `seconds` as `Stopwatch` gives them.

        Seconds of checkpoints and previews are not training, and do not count in the speed. `peak` are those that the
        interval's computation would take at the peak of the cards; without them there is no MFU.
        """
        now = time.monotonic()
        elapsed = max(now - self._since[0] - seconds.get("checkpoint", 0) - seconds.get("preview", 0), 1e-9)
        steps, seen = step - self._since[1], images - self._since[2]
        self._since = (now, step, images)
        # the remaining time uses a smoothed rate, so that a slow interval does not double it
        rate = seen / elapsed
        self._rate = rate if self._rate == 0 else 0.7 * self._rate + 0.3 * rate
        scalars = scalars | {"speed/images_per_second": rate, "speed/seconds_per_step": elapsed / steps}
        scalars["speed/data_wait"] = seconds.get("data", 0) / elapsed
        if "peak" in seconds:
            scalars["speed/mfu"] = seconds["peak"] / elapsed
        if "checkpoint" in seconds:
            scalars["speed/checkpoint_seconds"] = seconds["checkpoint"]
        scalars |= _peak_memory(self.device)
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        record = {"step": step, "images": images, "time": datetime.now(UTC).isoformat(timespec="seconds"), **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        left = timedelta(seconds=round((self.total - images) / max(self._rate, 1e-9)))
        log.info("step %d  %d/%d images  %s  left %s", step, images, self.total, _line(scalars), left)

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Report a grid of uint8 images [k, 3, H, W]."""
        self.board.add_image(tag, make_grid(images, nrow=8, padding=1), step)

    def close(self) -> None:
        """Note that the run has reached its end."""
        self.board._get_file_writer().add_summary(self._hparams[2])
        self.board.close()


class Stopwatch:
    """Seconds of an interval, by what took them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        """Count the seconds of a `with` block as those of `what`."""
        begun = time.monotonic()
        yield
        self.add(what, time.monotonic() - begun)

    def add(self, what: str, seconds: float) -> None:
        self._seconds[what] = self._seconds.get(what, 0) + seconds

    def drain(self) -> dict[str, float]:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class Averages:
    """Sums of scalars on the device, read once per interval, so that no step waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add scalars as float32 [2], sum and count."""
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def drain(self) -> dict[str, float]:
        """The means over all ranks since the last call, without names that have a count of 0. A collective."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        sums = torch.stack([value.to(device) for value in self._sums.values()])
        if c10d.is_initialized():
            c10d.all_reduce(sums)
        means = {name: total / count for name, (total, count) in zip(self._sums, sums.cpu().tolist()) if count}
        self._sums.clear()
        return means


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; scalars of earlier versions have their present names."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{RENAMED.get(name, name): value for name, value in record.items()} for record in records]


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for an invalid line, such as one cut off by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _peak_memory(device: torch.device) -> dict[str, float]:
    """The peaks of a GPU's memory since the last call, in GB: of tensors, and of what torch holds for them."""
    if device.type != "cuda":
        return {}
    peaks = {
        "memory/allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "memory/reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return peaks


def _line(scalars: dict[str, float]) -> str:
    """The scalars of a console line; MFU, memory and checkpoints only where they were measured."""
    allocated, reserved = scalars.get("memory/allocated_gb"), scalars.get("memory/reserved_gb")
    parts = [
        f"loss {scalars.get('loss', math.nan):.4f}", f"lr {scalars.get('optim/lr', 0):.2e}",
        f"|grad| {scalars.get('optim/grad_norm', math.nan):.2f}", f"{scalars['speed/images_per_second']:.0f} images/s",
        f"{scalars['speed/seconds_per_step']:.3g} s/step",
        f"MFU {scalars['speed/mfu']:.0%}" if "speed/mfu" in scalars else "",
        f"wait {scalars['speed/data_wait']:.0%}",
        f"memory {allocated:.1f} of {reserved:.1f} GB" if allocated is not None else "",
        f"checkpoint {scalars['speed/checkpoint_seconds']:.1f} s" if "speed/checkpoint_seconds" in scalars else "",
    ]  # fmt: skip
    return "  ".join(part for part in parts if part)
