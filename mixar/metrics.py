"""The reports of a run: TensorBoard, metrics.jsonl with the same scalars, and a console line per interval."""

import json
import math
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from mixar import files
from mixar.log import log


class Metrics:
    """Writes to `run_dir`/tb and `run_dir`/metrics.jsonl.

    Args:
        step: the step after which a run resumes. Later lines are removed, since the run writes them again.
        images: number of images seen at that step.
        total: number of images of the whole run, for the remaining time.
    """

    def __init__(self, run_dir: Path, step: int, images: int, total: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
            files.write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(run_dir / "tb"), purge_step=step + 1)
        self.total = total
        self._since = (time.monotonic(), images)
        self._rate = 0.0

    def write(self, step: int, images: int, scalars: dict[str, float], wait: float) -> None:
        """Report an interval: its mean scalars, and `wait`, its seconds of waiting for data."""
        now = time.monotonic()
        elapsed, seen = now - self._since[0], images - self._since[1]
        self._since = (now, images)
        # the remaining time uses a smoothed rate, so that a slow interval does not double it
        rate = seen / max(elapsed, 1e-9)
        self._rate = rate if self._rate == 0 else 0.7 * self._rate + 0.3 * rate
        scalars = scalars | {"images_per_second": rate, "data_wait": wait / max(elapsed, 1e-9)}
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        record = {"step": step, "images": images, "time": datetime.now(UTC).isoformat(timespec="seconds"), **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        left = timedelta(seconds=round((self.total - images) / max(self._rate, 1e-9)))
        log.info(
            "step %d  %d/%d images  loss %.4f  lr %.2e  |grad| %.2f  %.0f images/s  wait %.0f%%  left %s",
            step, images, self.total, scalars.get("loss", math.nan), scalars.get("lr", 0),
            scalars.get("grad_norm", math.nan), rate, 100 * scalars["data_wait"], left,
        )  # fmt: skip

    def leave_out(self, seconds: float) -> None:
        """Exclude seconds that were not training (a preview, a checkpoint) from the next interval's rate."""
        self._since = (self._since[0] + seconds, self._since[1])

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Report a grid of uint8 images [k, 3, H, W]."""
        self.board.add_image(tag, make_grid(images, nrow=8, padding=1), step)

    def close(self) -> None:
        self.board.close()


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


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for an invalid line, such as one cut off by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
