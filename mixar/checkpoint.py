"""The run directory: what lies where, checkpoints that are complete or not there, and one run at a time.

config.yaml env.json log.txt metrics.jsonl tb/ replay/ checkpoints/<images>/ exports/<images>-ema/ samples/ eval/
"""

import fcntl
import json
import os
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch.distributed as c10d
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mixar import dist
from mixar.config import Config, load_config, to_dict, to_yaml
from mixar.dist import Place
from mixar.engine import Engine
from mixar.engine.slices import Slice, load_slices, save_slices
from mixar.environment import environment
from mixar.errors import PassingError, UserError
from mixar.metrics import log, start_log

DONE = "DONE"
FORMAT = 2
# what shapes the weights, the draws or the count of images: a resumed run must not change these keys and sections
FIXED = ("task", "seed", "train.batch", "vae", "tokenizer", "prior", "model")


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    images: int = 0


class RunDirectory:
    """One run's folder, made and written by rank 0; its methods are collectives.

    Raises:
        UserError: another run trains here, or the config differs from the run's in what cannot change.
    """

    def __init__(self, cfg: Config, place: Place) -> None:
        self.path, self.cfg, self.place = Path(cfg.run_dir), cfg, place
        lock: list[IO[str]] = []
        dist.on_main(place, lambda: lock.append(self._open()))
        self._lock = lock[0] if lock else None
        if not place.is_main:
            start_log(self.path / "log.txt", place.rank)
        # the writer's own, beside the training's
        self._group: Any = c10d.new_group(backend="gloo") if place.world > 1 else None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None

    def _open(self) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._take()
        except OSError as error:
            raise UserError(
                f"run_dir={self.path} cannot be written ({error.strerror}): write run_dir=<a folder you own>"
            ) from None
        start_log(self.path / "log.txt")
        self._check(self.cfg)
        (self.path / "config.yaml").write_text(to_yaml(self.cfg))
        (self.path / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
        for torn in (self.path / "checkpoints").glob(".*.partial"):
            shutil.rmtree(torn)
        return lock

    def _take(self) -> IO[str]:
        lock = (self.path / ".lock").open("a")
        try:
            # a lock of the process: unlike flock's, the loader's workers do not inherit it, and outlive a kill with it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise PassingError(  # a job that was requeued may come before its lost node has let go
                f"another process is training in {self.path}: wait for it, or write run_dir=<another folder>"
            ) from None
        return lock

    def _check(self, cfg: Config) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        before, now = to_dict(load_config(file)), to_dict(cfg)
        for key, old, new in _differences(before, now):
            if (key in FIXED or key.split(".")[0] in FIXED) and not key.endswith((".weights", ".attention")):
                raise UserError(
                    f"{file} was started with {key}={old}, now it is {new}: write {key}={old}, or another run_dir"
                )
            if key != "run_dir":
                log.info("%s was %s, from here on it is %s", key, old, new)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Begin a checkpoint: copy the state, and let a thread write it while training goes on.

        Written aside, it gets a DONE with the sum of every file once all ranks' files are on the disk, and then its
        name; beyond `train.keep`, the oldest go.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        self.wait()
        self._written = self._writer.submit(self._write, engine.save(), progress)

    def _write(self, state: dict[str, Slice], progress: Progress) -> None:
        folder = self.path / "checkpoints"
        final, aside = folder / f"{progress.images:012d}", folder / f".{progress.images:012d}.partial"
        save_slices(state, aside, self._group)
        sums = _sums(aside, f"__{self.place.rank}_*")
        if self._group is not None:
            gathered: list[Any] = [None] * self.place.world
            c10d.all_gather_object(gathered, sums, self._group)
            sums = {name: value for part in gathered for name, value in part.items()}
        if not self.place.is_main:
            return
        (aside / "config.yaml").write_text(to_yaml(self.cfg))
        (aside / "progress.json").write_text(json.dumps({"format": FORMAT, **vars(progress)}))
        (aside / DONE).write_text(json.dumps(sums | _sums(aside, ".metadata"), indent=2) + "\n")
        _sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(folder)
        for old in self.checkpoints()[: -self.cfg.train.keep]:
            shutil.rmtree(old)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint being written is known to have failed here."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint that was begun last is complete.

        Raises:
            UserError: it could not be written; those before it are as they were.
        """
        if self._written is None:
            return
        written, self._written = self._written, None
        error = written.exception()
        if not any(dist.gather(self.place, error is not None)):
            return
        if error is not None and not isinstance(error, CheckpointException | OSError):
            raise error
        kept = self.checkpoints()
        if self.place.is_main:
            for torn in (self.path / "checkpoints").glob(".*.partial"):
                shutil.rmtree(torn, ignore_errors=True)  # it may hold the room that is missing
        then = f"goes on from {kept[-1]}" if kept else "starts anew, for there is none yet"
        raise (UserError if self.place.is_main else dist.ElsewhereError)(
            f"a checkpoint in {self.path} could not be written ({_reason(error) if error else 'on another rank'}): "
            f"make room, then the same command {then}"
        )

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.path)

    def load(self, engine: Engine) -> Progress:
        """Load the newest complete checkpoint; passes over damaged ones and those of another format, naming them."""
        for folder in reversed(dist.on_main(self.place, self.checkpoints)):
            saved, fault = dist.on_main(self.place, partial(_head, folder))
            fault = fault or self._damage(folder, saved["sums"])
            if fault is None:
                try:
                    engine.load(folder)
                except CheckpointException as error:
                    fault = _reason(error)
            if fault is None:
                log.info("resuming from %s: step %d, %d images", folder, saved["step"], saved["images"])
                return Progress(saved["step"], saved["images"])
            log.info("passing over %s: %s", folder, fault)  # an older one may still be whole
        return Progress()

    def _damage(self, folder: Path, sums: dict[str, int]) -> str | None:
        """Which of a checkpoint's files do not have their sums; the ranks read a share of them each, and agree."""
        own = sorted(sums)[self.place.rank :: self.place.world]
        wrong = [name for name in own if _sums(folder, name).get(name) != sums[name]]
        faults = [name for found in dist.gather(self.place, wrong) for name in found]
        return f"{', '.join(faults)} changed since it was written" if faults else None

    def close(self) -> None:
        """Wait for the writer and let others have the folder.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._lock is not None:
                self._lock.close()

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
    state = {
        f"{'ema' if name in averaged else 'model'}.{name}": Slice(value.shape, 0, value.view(-1))
        for name, value in model.state_dict().items()
    }
    try:
        load_slices(state, checkpoint)  # in place
    except (CheckpointException, OSError) as error:
        raise UserError(
            f"{checkpoint} cannot be read ({_reason(error)}): remove it, then the one before it is taken"
        ) from None


def _head(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's progress with the sums of its files, or what is wrong with them."""
    try:
        saved = json.loads((folder / "progress.json").read_text())
        if saved["format"] != FORMAT:
            return saved, f"format {saved['format']}, this version reads {FORMAT}"
        return saved | {"sums": json.loads((folder / DONE).read_text())}, None
    except (OSError, ValueError, KeyError) as error:
        return {}, f"{type(error).__name__}: {error}"


def _reason(error: BaseException) -> str:
    """Why a checkpoint cannot be read, in one line; CheckpointException wraps what a damaged file raises, by rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200]


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key, new in now.items():
        old = before.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def _sums(folder: Path, pattern: str) -> dict[str, int]:
    """The CRC-32 of each file in `folder` that matches."""
    found = {}
    for path in folder.glob(pattern):
        total = 0
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                total = zlib.crc32(part, total)
        found[path.name] = total
    return found


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename after it never names empty ones."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
