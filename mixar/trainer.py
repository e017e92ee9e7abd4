"""The loop: fetch, step, tell, keep."""

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mixar import draws
from mixar.checkpoint import Progress, RunDirectory
from mixar.config import Config
from mixar.data.batch import Batch, Source
from mixar.data.loader import Loader
from mixar.dist import Place
from mixar.draws import Stream
from mixar.engine import LocalEngine, StepInfo, build_optimizer, learning_rate
from mixar.errors import UserError
from mixar.metrics import Averages, Metrics, log
from mixar.objectives import Objective
from mixar.objectives.base import mean_of
from mixar.weights import load_by_name


class Trainer:
    """Trains one objective on one source until `train.epochs` are seen; the same call again resumes."""

    def __init__(self, cfg: Config, objective: Objective, source: Source, place: Place, run: RunDirectory) -> None:
        self.cfg, self.objective, self.source, self.place, self.run_dir = cfg, objective, source, place, run
        self.count = sum(source.shard_sizes)
        model = objective.build()
        if cfg.init_from is not None:
            load_by_name(model, cfg.init_from, log.info)
        model.to(place.device)
        optimizer = build_optimizer(model, cfg.optim, objective.decays)
        self.engine = LocalEngine(model, objective.loss, optimizer, cfg.optim, self._lr, place, cfg.train.precision)
        self.progress = run.load(self.engine)
        self.steps = math.ceil(cfg.train.epochs * self.count / cfg.train.batch)

    def _lr(self, epoch: float) -> float:
        return learning_rate(self.cfg.optim, self.cfg.train.batch, epoch, self.cfg.train.epochs)

    def epoch(self, step: int) -> float:
        """Epochs seen after `step` steps."""
        return step * self.cfg.train.batch / self.count

    def run(self) -> Path:
        """Train to the end, then write the export of the EMA weights and return its folder.

        Raises:
            UserError: too many non-finite steps in a row.
        """
        metrics = Metrics(
            self.run_dir.path, self.progress.step, self.progress.images, self.steps * self.cfg.train.batch
        )
        averages, wait, recent = Averages(), 0.0, _Recent()
        batches = self._batches()
        for step in range(self.progress.step, self.steps):
            begun = time.monotonic()
            micro = next(batches)
            wait += time.monotonic() - begun
            epoch = self.epoch(step)
            # dropout is the one draw that is not keyed by image: seed it by step and rank
            turn = torch.tensor([step * self.place.world + self.place.rank])
            torch.manual_seed(int(draws.bits(self.cfg.seed, Stream.DROPOUT, turn, 1).item()))
            info = self.engine.step(micro, epoch)
            self.progress = Progress(step + 1, (step + 1) * self.cfg.train.batch)
            recent.add(step, micro, info)
            told = info.scalars | {"grad_norm": mean_of(info.grad_norm)}
            averages.add(
                {name: torch.where(info.finite > 0, value, 0.0) for name, value in told.items()}
            )  # not skipped ones

            last = step + 1 == self.steps
            if last or (step + 1) % self.cfg.train.log_every == 0 or self._due(step, self.cfg.train.checkpoint_every):
                self._handle_skips(recent)
                means = averages.drain() | {"lr": self._lr(epoch), "ema_distance": self.engine.ema_distance().item()}
                metrics.write(step + 1, self.progress.images, means, wait)
                wait = 0.0
            metrics.pause()
            if last or self._due(step, self.cfg.train.samples_every):
                self._preview(metrics)
            if last or self._due(step, self.cfg.train.checkpoint_every):
                self.run_dir.save(self.engine, self.progress, self.cfg.train.keep)
            metrics.resume()
        metrics.close()
        return self._export()

    def _batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step, from where the run stands."""
        train = self.cfg.train
        micro = train.micro_batch or train.batch // self.place.world
        loader = Loader(
            self.source, self.cfg.seed, train.batch, micro, self.place.rank, self.place.world, self.cfg.data.workers,
            self.cfg.data.flip, start=self.progress.images,
        )  # fmt: skip
        stream = iter(loader)
        accumulate = train.batch // (micro * self.place.world)
        while True:
            yield [batch.to(self.place.device) for batch in itertools.islice(stream, accumulate)]

    def _due(self, step: int, every: float) -> bool:
        """Whether a period of `every` epochs ends with this step; 0 is never."""
        return every > 0 and int(self.epoch(step + 1) / every) > int(self.epoch(step) / every)

    def _handle_skips(self, recent: "_Recent") -> None:
        for record in recent.skipped():
            file = self.run_dir.write_replay(record["step"], record | {"seed": self.cfg.seed})
            numbers = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
            log.info("step %d was not finite (%s) and was skipped: %s", record["step"], numbers, file)
        if recent.in_a_row > self.cfg.train.max_skips:
            raise UserError(
                f"{recent.in_a_row} steps in a row were not finite, train.max_skips={self.cfg.train.max_skips} may be; "
                f"{self.run_dir.path / 'replay'} names their images: lower optim.lr, or write train.precision=fp32"
            )

    def _replica(self) -> torch.nn.Module:
        """A plain model on this device with the EMA weights, away from the engine."""
        model = self.objective.build()
        model.load_state_dict(self.engine.full_weights("ema"))
        return model.to(self.place.device).eval()

    def _preview(self, metrics: Metrics) -> None:
        with self.place.autocast(self.cfg.train.precision):
            images = self.objective.preview(self._replica())
        if images is not None:
            metrics.images("samples", images, self.progress.step)

    def _export(self) -> Path:
        folder = self.run_dir.export_path(self.progress.images)
        if not folder.exists():
            about = {"images": self.progress.images, "epochs": self.epoch(self.progress.step), "weights": "ema"}
            self.objective.export(self._replica(), folder, about)
        log.info("trained: the EMA weights are in %s", folder)
        return folder


class _Recent:
    """The steps of the current interval, to find the skipped ones without asking the device after each."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._steps: list[tuple[int, list[str], StepInfo]] = []

    def add(self, step: int, batches: list[Batch], info: StepInfo) -> None:
        self._steps.append((step, [key for batch in batches for key in batch.keys], info))

    def skipped(self) -> list[dict[str, Any]]:
        """A record of each step that was skipped since the last call."""
        records = []
        for step, keys, info in self._steps:
            finite = bool(info.finite.item())
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if not finite:
                records.append(
                    {"step": step, "loss": str(info.loss.item()), "grad_norm": str(info.grad_norm.item()), "keys": keys}
                )
        self._steps.clear()
        return records
