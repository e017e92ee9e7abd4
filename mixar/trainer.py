"""The training loop: fetch a batch, step, log, save."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixar import dist, rng
from mixar.cards import find_card
from mixar.checkpoint import Progress, RunDirectory
from mixar.config import Config, images_per_pass, profiled_steps
from mixar.data.batch import Batch, Source
from mixar.data.loader import Loader
from mixar.dist import Agreement, Place
from mixar.engine import Scalars, StepInfo, build_engine, learning_rate
from mixar.errors import UserError
from mixar.failures import in_words
from mixar.log import log
from mixar.metrics import Averages, Metrics, Stopwatch
from mixar.objectives import MixARObjective, Objective
from mixar.objectives.base import mean_of
from mixar.plan import step_flops
from mixar.profiler import StepProfiler
from mixar.rng import Stream
from mixar.signals import Signals
from mixar.watch import Watchdog
from mixar.weights import export_path, holds, read_fitting

GO, STOP, INTERRUPTED, FAILED = range(4)  # the ranks agree on one before a step; the largest wins


class Stopped(KeyboardInterrupt):
    """A signal ended the run early, after a checkpoint. A program that does not catch it ends as after Ctrl-C.

    Attributes:
        status: the exit status: 130 after Ctrl-C, 0 after a scheduler's signal.
    """

    def __init__(self, status: int) -> None:
        self.status = status


class Trainer:
    """Trains one objective on one source until `train.epochs` are seen; the same call again resumes."""

    def __init__(self, cfg: Config, objective: Objective, source: Source, place: Place, run: RunDirectory) -> None:
        self.cfg, self.objective, self.source, self.place, self.run_dir = cfg, objective, source, place, run
        self.count = sum(source.shard_sizes)
        task = _Task(objective, cfg, fresh=not dist.on_main(place, run.checkpoints))
        self.engine = build_engine(cfg, task, place)
        task.given.clear()  # they are in the engine now
        dist.limit_groups(cfg.engine.timeout)
        self.progress = run.load(self.engine)
        self._saved = self.progress
        self.steps = math.ceil(cfg.train.epochs * self.count / cfg.train.batch)

    def epoch(self, step: int) -> float:
        """Epochs seen after `step` steps."""
        return step * self.cfg.train.batch / self.count

    def run(self) -> Path:
        """Train to the end, then write the export of the EMA weights and return its folder.

        Raises:
            Stopped: a signal ended the run; a checkpoint was written.
            UserError: too many non-finite steps in a row, or a checkpoint that cannot be written.
        """
        cfg, train, run, place = self.cfg, self.cfg.train, self.run_dir, self.place
        averages, watch, recent, agreement = Averages(), Stopwatch(), _Recent(), Agreement(place, cfg.engine.timeout)
        metrics, peak_seconds = self._metrics(), self._peak_seconds()
        with (
            Signals(place.launcher) as signals,
            Watchdog(cfg.engine.timeout, run.path / "flight", place.rank) as watchdog,
            StepProfiler(profiled_steps(train.profile if place.is_main else None), run.path / "tb") as profiler,
            closing(self._batches()) as batches,
        ):
            for step in range(self.progress.step, self.steps):
                watchdog.beat(step)
                self._heed(agreement.exchange(self._wish(signals)))
                epoch, last = self.epoch(step), step + 1 == self.steps
                due = last or (step + 1) % train.log_every == 0 or self._due(step, train.checkpoint_every)
                with profiler.step(step):
                    with watch.time("data"):
                        micro = next(batches)
                    info = self.engine.step(micro, epoch, measure=due)
                if peak_seconds is not None:
                    watch.add("peak", peak_seconds(epoch))
                self.progress = Progress(step + 1, (step + 1) * train.batch)
                recent.add(step, micro, info)
                scalars = info.scalars | {"optim/grad_norm": mean_of(info.grad_norm)}
                averages.add({name: torch.where(info.finite > 0, value, 0.0) for name, value in scalars.items()})
                if due:
                    self._report_odd_steps(recent)
                    assert info.ema_distance is not None
                    means = averages.drain()
                    means |= {"optim/lr": learning_rate(cfg, epoch), "optim/ema_distance": info.ema_distance.item()}
                    seconds = watch.drain()
                    if metrics is not None:
                        metrics.write(step + 1, self.progress.images, means, seconds)
                if last or self._due(step, train.checkpoint_every):
                    with watch.time("checkpoint"):
                        self._save()
                if self._due(step, train.samples_every) or (last and train.samples_every > 0):
                    with watch.time("preview"):
                        self._preview(metrics)
            agreement.settle()
            if metrics is not None:
                metrics.close()
            run.wait()
            return self._export()

    def _metrics(self) -> Metrics | None:
        """The reports, on rank 0."""
        if not self.place.is_main:
            return None
        progress, total = self.progress, self.steps * self.cfg.train.batch
        return Metrics(self.run_dir.path, self.cfg, self.place.device, progress.step, progress.images, total)

    def _peak_seconds(self) -> Callable[[float], float] | None:
        """The seconds that a step would take at the peak of the cards, as a function of the epoch.

        None on a CPU, on a card of unknown peak, and for a network other than MixAR, whose FLOP are not counted.
        """
        cuda = self.place.device.type == "cuda"
        card = find_card(torch.cuda.get_device_name(self.place.device)) if cuda else None
        if card is None or not isinstance(self.objective, MixARObjective):
            return None
        peak = self.place.world * (card.bf16 if self.cfg.train.precision == "bf16" else card.fp32)
        flops = step_flops(self.cfg, images_per_pass(self.cfg, self.place.world), self.objective.prior)
        return lambda epoch: self.cfg.train.batch * flops(epoch) / peak

    def _wish(self, signals: Signals) -> int:
        """This rank's vote in the agreement before a step."""
        if self.run_dir.failed:
            return FAILED
        return GO if signals.caught is None else INTERRUPTED if signals.caught == "SIGINT" else STOP

    def _heed(self, agreed: int) -> None:
        """Do what the ranks agreed on."""
        if agreed == FAILED:
            self.run_dir.wait()  # raises on every rank
        elif agreed != GO:
            if self.progress != self._saved:
                self._save()
            self.run_dir.wait()
            log.info("stopped by a signal after step %d, a checkpoint is kept: the same command resumes",
                     self.progress.step)  # fmt: skip
            raise Stopped(130 if agreed == INTERRUPTED else 0)

    def _save(self) -> None:
        self.run_dir.save(self.engine, self.progress)
        self._saved = self.progress

    def _batches(self) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of each step, from the current progress on."""
        train = self.cfg.train
        micro = images_per_pass(self.cfg, self.place.world)
        loader = Loader(
            self.source, self.cfg.seed, train.batch, micro, self.place.rank, self.place.world, self.cfg.data.workers,
            self.cfg.data.flip, start=self.progress.images,
        )  # fmt: skip
        accumulate = train.batch // (micro * self.place.world)
        with closing(iter(loader)) as stream:
            while True:
                yield [batch.to(self.place.device) for batch in itertools.islice(stream, accumulate)]

    def _due(self, step: int, every: float) -> bool:
        """Whether a period of `every` epochs ends with this step; never if it is 0."""
        return every > 0 and int(self.epoch(step + 1) / every) > int(self.epoch(step) / every)

    def _report_odd_steps(self, recent: "_Recent") -> None:
        """Report steps that were not finite or jumped, and write their images to replay/; a collective."""
        parts = dist.gather(self.place, recent.drain())
        for record in parts[0] if self.place.is_main else []:
            keys = [key for part in parts for other in part if other["step"] == record["step"] for key in other["keys"]]
            file = self.run_dir.write_replay(record["step"], record | {"keys": keys, "seed": self.cfg.seed})
            numbers = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
            if record["finite"]:
                medians = f"loss {record['median_loss']}, gradient norm {record['median_grad_norm']}"
                log.warning("step %d jumped (%s; median before: %s): %s", record["step"], numbers, medians, file)
            else:
                log.info("step %d was not finite (%s) and was skipped: %s", record["step"], numbers, file)
        if recent.in_a_row > self.cfg.train.max_skips:
            raise UserError(
                f"{recent.in_a_row} steps in a row were not finite, more than train.max_skips="
                f"{self.cfg.train.max_skips}; {self.run_dir.path / 'replay'} lists their images: lower optim.lr, or "
                "write train.precision=fp32"
            )

    def _replica(self) -> nn.Module | None:
        """A plain model with the EMA weights, independent of the engine, on rank 0; a collective."""
        weights = self.engine.full_weights("ema")
        if not self.place.is_main:
            return None
        with torch.device("meta"):
            model = self.objective.bare()
        model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
        return model.to(self.place.device).eval()

    def _preview(self, metrics: Metrics | None) -> None:
        model = self._replica()
        if model is None or metrics is None:
            return
        try:
            with self.place.autocast(self.cfg.train.precision):
                images = self.objective.preview(model)
            if images is not None:
                metrics.images("samples", images, self.progress.step)
        except Exception as error:  # of any kind: a failed preview must not end the training
            reported = in_words(error)
            traced = None if isinstance(reported, UserError) else error
            log.error("the preview after step %d failed, the run continues: %s", self.progress.step, reported,
                      exc_info=traced)  # fmt: skip

    def _export(self) -> Path:
        if self.steps and not dist.on_main(self.place, self.engine.updates.item):
            raise UserError(
                f"none of the run's {self.steps} steps was finite, so nothing was learned: lower optim.lr, or write "
                "train.precision=fp32"
            )
        folder = export_path(self.run_dir.path, self.progress.images)
        model = self._replica()
        about = {"images": self.progress.images, "epochs": self.epoch(self.progress.step), "weights": "ema"}

        def write() -> None:
            assert model is not None
            if not holds(folder, model.state_dict()):
                self.objective.export(model, folder, about)

        dist.on_main(self.place, write)
        log.info("trained: the EMA weights are in %s", folder)
        return folder


class _Task:
    """An objective as the engine's task: it starts from the weights of `init_from`, and seeds torch per micro-batch."""

    def __init__(self, objective: Objective, cfg: Config, fresh: bool) -> None:
        self.objective, self.seed = objective, cfg.seed
        self.build, self.decays = objective.build, objective.decays
        self.survey = getattr(objective, "survey", None)
        self.given: dict[str, Tensor] = {}
        if cfg.init_from is not None and fresh:  # a resumed run has its own weights
            with torch.device("meta"):
                own = objective.build().state_dict()
            self.given = read_fitting(cfg.init_from, own, log.info, cfg.trust_pickle)

    def initial(self, name: str, like: Tensor) -> Tensor:
        return self.given[name] if name in self.given else self.objective.initial(name, like)

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        # torch's own random numbers, in the prior's training and in all dropout on GPUs, are a function of
        # the micro-batch, on whichever rank it is; all others are a function of the image
        first = torch.tensor(batch.host_index[:1])
        torch.manual_seed(int(rng.bits(self.seed, Stream.DROPOUT, first, 1).item()))
        return self.objective.loss(model, batch, epoch)


class _Recent:
    """The steps of the current interval, to find odd ones without waiting for the device after each step.

    A step jumps if its loss or its gradient norm is more than `SPREADS` times the spread of the last `WINDOW` finite
    steps above their median, and more than twice as high. Of several in a row the first counts.
    """

    WINDOW, FEWEST, SPREADS = 100, 30, 10

    def __init__(self) -> None:
        self.in_a_row = 0
        self._steps: list[tuple[int, list[str], StepInfo]] = []
        self._before = [deque[float](maxlen=self.WINDOW) for _ in ("loss", "gradient norm")]
        self._jumped = False

    def add(self, step: int, batches: list[Batch], info: StepInfo) -> None:
        self._steps.append((step, [key for batch in batches for key in batch.keys], info))

    def drain(self) -> list[dict[str, Any]]:
        """A record of each step since the previous call that was skipped or jumped."""
        if not self._steps:
            return []
        infos = [info for _, _, info in self._steps]
        read = torch.stack([value.float() for info in infos for value in (info.finite, info.loss, info.grad_norm)])
        records = []
        for (step, keys, _), (finite, *values) in zip(self._steps, read.view(-1, 3).tolist()):
            record = {"step": step, "finite": bool(finite), "loss": str(values[0]), "grad_norm": str(values[1])}
            if not finite:
                self.in_a_row += 1
                records.append(record | {"keys": keys})
                continue
            self.in_a_row = 0
            jumps = any(self._exceeds(value, before) for value, before in zip(values, self._before))
            if jumps and not self._jumped:
                medians = [statistics.median(before) for before in self._before]
                record |= {"median_loss": medians[0], "median_grad_norm": medians[1]}
                records.append(record | {"keys": keys})
            self._jumped = jumps
            for value, before in zip(values, self._before):
                before.append(value)
        self._steps.clear()
        return records

    def _exceeds(self, value: float, before: deque[float]) -> bool:
        if len(before) < self.FEWEST:
            return False
        median = statistics.median(before)
        # the median of deviations does not see single earlier jumps; 1.48 of it is a normal distribution's deviation
        spread = 1.48 * statistics.median(abs(other - median) for other in before)
        return value - median > self.SPREADS * max(spread, 0.1 * abs(median))
