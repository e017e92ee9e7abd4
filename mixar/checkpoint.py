"""The run directory: its files, checkpoints that appear complete or not at all, and one run at a time.

config.yaml env.json log.txt metrics.jsonl tb/ replay/ checkpoints/<images>/ exports/<images>-ema/ samples/ eval/
"""

import fcntl
import json
import shlex
import shutil
import uuid
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mixar import dist, files
from mixar.config import Config, load_config, to_dict, to_yaml
from mixar.dist import Place
from mixar.engine import Engine
from mixar.engine.slices import Slice, load_slices, save_slices
from mixar.environment import environment
from mixar.errors import PassingError, UserError
from mixar.log import log, start_log

DONE = "DONE"
FORMAT = 2
# keys and sections that shape the weights, the draws or the count of images: a resumed run must not change them
FIXED = ("task", "seed", "train.batch", "data.flip", "mask", "vae", "tokenizer", "prior", "model")
# except these: other kernels compute the same, and frozen networks are compared by fingerprint, not by path
FREE = (
    "model.attention", "vae.weights", "tokenizer.weights", "prior.weights", "vae.perceptual_features",
    "tokenizer.perceptual_features",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """The progress of a run."""

    step: int = 0
    images: int = 0


class RunDirectory:
    """One run's folder, created and written by rank 0. Its methods are collectives, except `close`.

    Attributes:
        data: a description of the training data, stored in every checkpoint; see `begin`.

    Raises:
        UserError: another process trains here, or the config changes keys of the run that are fixed.
    """

    def __init__(self, cfg: Config, place: Place) -> None:
        self.path, self.cfg, self.place = Path(cfg.run_dir), cfg, place
        self.data: dict[str, Any] = {}
        lock: list[IO[str]] = []
        dist.on_main(place, lambda: lock.append(self._open()))
        self._lock = lock[0] if lock else None
        if not place.is_main:
            start_log(self.path / "log.txt", place.rank)
        self._group = dist.side_group(place, cfg.engine.timeout)  # for the writer, beside the group of the training
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None

    def _open(self) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock, unlocked = self._take()
            start_log(self.path / "log.txt")
        except OSError as error:
            raise UserError(
                f"run_dir={self.path} cannot be written ({error.strerror}): free space there, or write run_dir=<a "
                "folder you own>"
            ) from None
        if unlocked:
            log.warning("%s: make sure that no other process trains in %s", unlocked, self.path)
        self._check(self.cfg)
        for name in ("config.yaml", "env.json", "metrics.jsonl"):
            for left in self.path.glob(f".{name}.*{files.PART}"):  # of a start that was killed
                left.unlink()
        self._sweep()
        return lock

    def _take(self) -> tuple[IO[str], str | None]:
        """The lock of the folder, and a message where its file system has no locks."""
        lock = (self.path / ".lock").open("a")
        try:
            # unlike flock's, this lock is not inherited by the loader's workers, which may outlive a kill
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise PassingError(  # a requeued job may start before its lost node has released the lock
                f"another process is training in {self.path}: wait for it, or write run_dir=<another folder>"
            ) from None
        except OSError as error:
            if error.errno not in files.LOCKLESS:
                raise
            return lock, f"the file system has no locks ({error.strerror})"
        return lock, None

    def _check(self, cfg: Config) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        try:
            if "\nsample:" not in file.read_text():  # the last section
                raise UserError(f"{file} is incomplete")
            before, now = to_dict(load_config(file)), to_dict(cfg)
        except (UserError, UnicodeDecodeError) as error:
            whole = [str(folder / "config.yaml") for folder in self.checkpoints()]
            fix = shlex.join(["cp", whole[-1], str(file)] if whole else ["rm", str(file)])
            raise UserError(f"the run's own config is damaged ({error}): {fix}, then start it again") from None
        for key, old, new in _differences(before, now):
            if (key in FIXED or key.split(".")[0] in FIXED) and key not in FREE:
                raise UserError(
                    f"{file} was started with {key}={old}, now it is {new}: write {key}={old}, or another run_dir"
                )
            if key != "run_dir":
                log.info("%s changes from %s to %s", key, old, new)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Start a checkpoint: copy the state, and let a thread write it while training goes on.

        It is written under another name. Once the files of all ranks are on the disk, it gets a DONE with the sum of
        every file, and then its own name. Of more than `train.keep` checkpoints, the oldest are removed.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self.wait()
        self._written = self._writer.submit(self._write, engine.save(), progress)

    def _write(self, state: dict[str, Slice], progress: Progress) -> None:
        folder = self.path / "checkpoints"
        final, aside = folder / f"{progress.images:012d}", folder / f".{progress.images:012d}.partial"
        save_slices(state, aside, self._group)
        parts = dist.on_each(self.place, lambda: _sums(aside, f"__{self.place.rank}_*"), self._group)
        if not self.place.is_main:
            return
        (aside / "config.yaml").write_text(to_yaml(self.cfg))
        files.write_json(aside / "progress.json", {"format": FORMAT, **vars(progress), "data": self.data})
        own = (_sums(aside, name) for name in (".metadata", "config.yaml", "progress.json"))
        sums = {name: value for part in [*parts, *own] for name, value in part.items()}
        files.write_json(aside / DONE, sums)
        files.put_in_place(aside, final, _gone(final))
        # not later ones: a run that had to go back has not reached them again
        kept = [old for old in self.checkpoints() if int(old.name) <= progress.images]
        for old in kept[: -self.cfg.train.keep]:
            old.rename(_gone(old))
        self._sweep()

    def _sweep(self) -> None:
        """Remove incomplete and surplus checkpoints. One that cannot be removed now, since it is read, can be later."""
        for left in (self.path / "checkpoints").glob(".[0-9]*"):
            try:
                shutil.rmtree(left)
            except OSError as error:
                log.warning("%s cannot be removed yet (%s)", left, error.strerror)

    @property
    def failed(self) -> bool:
        """Whether the writing of the current checkpoint has failed on this rank."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            UserError: it could not be written; earlier ones are unchanged.
        """
        if self._written is None:
            return
        written, self._written = self._written, None
        error = written.exception()
        reasons = [reason for reason in dist.gather(self.place, error and _reason(error)) if reason is not None]
        if not reasons:
            return
        if error is not None and not isinstance(error, CheckpointException | OSError | UserError):
            raise error
        kept = self.checkpoints()
        if self.place.is_main:
            self._sweep()  # incomplete checkpoints may take the space that is missing
        then = f"resumes from {kept[-1]}" if kept else "starts from the beginning, since there is none yet"
        raise (UserError if self.place.is_main else dist.ElsewhereError)(
            f"a checkpoint in {self.path} could not be written ({reasons[0]}): free space, then the same command {then}"
        )

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.path)

    def begin(self, data: dict[str, Any]) -> None:
        """Compare the training data with that of the run's checkpoints, and write the config and the environment.

        Args:
            data: plain values by name. A name on one side only belongs to a feature that was switched on or off.

        Raises:
            UserError: other data.
        """
        self.data = data
        dist.on_main(self.place, self._begin)

    def _begin(self) -> None:
        for folder in self.checkpoints():
            known = read_head(folder)[0].get("data", {})
            if other := [name for name in known if name in self.data and known[name] != self.data[name]]:
                raise UserError(
                    f"{folder} was trained on other data than data.images={self.cfg.data.images} and data.shards="
                    f"{self.cfg.data.shards} (they differ in {', '.join(other)}): name the former data, or train on "
                    f"the new ones with another run_dir and init_from={self.path}"
                )
        files.write_text(self.path / "config.yaml", to_yaml(self.cfg))
        files.write_json(self.path / "env.json", environment())

    def load(self, engine: Engine) -> Progress:
        """Load the newest complete checkpoint; skips damaged ones and those of another format, and logs them.

        Raises:
            UserError: there are checkpoints, but none can be loaded.
        """
        faults = []
        for folder in reversed(dist.on_main(self.place, self.checkpoints)):
            saved, fault = dist.on_main(self.place, partial(read_head, folder))
            fault = fault or self._damage(folder, saved["sums"])
            if fault is None:
                try:
                    engine.load(folder)
                except CheckpointException as error:
                    fault = _reason(error)
            if fault is None:
                log.info("resuming from %s: step %d, %d images", folder, saved["step"], saved["images"])
                return Progress(saved["step"], saved["images"])
            log.info("skipping %s: %s", folder, fault)  # an older one may be intact
            faults.append(f"{folder.name}: {fault}")
        if faults:
            folder = self.path / "checkpoints"
            raise (UserError if self.place.is_main else dist.ElsewhereError)(
                f"no checkpoint in {folder} can be loaded ({'; '.join(faults)}): restore an intact one, or to start "
                f"from the beginning, {shlex.join(['mv', str(folder), f'{folder}-damaged'])}"
            )
        return Progress()

    def _damage(self, folder: Path, sums: dict[str, int]) -> str | None:
        """A message about files of a checkpoint with wrong sums; every rank reads a share of them."""
        own = sorted(sums)[self.place.rank :: self.place.world]
        wrong = dist.gather(self.place, damaged(folder, {name: sums[name] for name in own}))
        return _changed([name for found in wrong for name in found])

    def close(self) -> None:
        """Release the folder, once a checkpoint that is being written is complete. Not a collective.

        A rank that ends by an error calls this alone, while its writer works as long as those of the others; the wait
        is limited to the time limit of a step.
        """
        if self._written is not None:
            wait([self._written], self.cfg.engine.timeout)
        self._writer.shutdown(wait=False)
        if self._lock is not None:
            self._lock.close()

    def write_replay(self, step: int, record: dict[str, Any]) -> Path:
        """Write what is needed to reproduce a skipped step, and return the file."""
        file = self.path / "replay" / f"step-{step}.json"
        files.write_json(file, record)
        return file


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of the run directory `run`, oldest first, named by the number of images seen."""
    return sorted(done.parent for done in (run / "checkpoints").glob(f"[0-9]*/{DONE}"))


def load_ema(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's EMA weights and buffers into `model`, without reading anything else or changing the run.

    Raises:
        UserError: a damaged checkpoint, or one of another model.
    """
    averaged = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {
        f"{'ema' if name in averaged else 'model'}.{name}": Slice(value.shape, 0, value.view(-1))
        for name, value in model.state_dict().items()
    }
    saved, fault = read_head(checkpoint)
    try:
        fault = fault or _changed(damaged(checkpoint, saved["sums"]))
        if fault is None:
            load_slices(state, checkpoint)  # in place
    except (CheckpointException, OSError) as error:
        fault = _reason(error)
    if fault is not None and not checkpoint.exists():
        raise PassingError(f"{checkpoint} was removed while it was read, as the run keeps only train.keep: try again")
    if fault is not None:
        raise UserError(f"{checkpoint} cannot be read ({fault}): remove it, then the previous one is used")


def read_head(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's progress with the sums of its files, and a message where they cannot be read."""
    try:
        saved = json.loads((folder / "progress.json").read_text())
        if saved["format"] != FORMAT:
            return {}, f"format {saved['format']}, this version reads {FORMAT}"
        sums = json.loads((folder / DONE).read_text())
        numbers = isinstance(saved["step"], int) and isinstance(saved["images"], int)
        if not numbers or not isinstance(saved.get("data", {}), dict):
            return {}, "progress.json is damaged"
        # of the first of this format, DONE has no sums of config.yaml and progress.json
        if lacking := {".metadata", *(path.name for path in folder.glob("__*_*"))} - sums.keys():
            return {}, f"DONE lacks the sum of {', '.join(sorted(lacking))}"
        return saved | {"sums": sums}, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{type(error).__name__}: {error}"


def _reason(error: BaseException) -> str:
    """The reason why a checkpoint cannot be read, in one line; CheckpointException wraps the errors of the ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, UserError):  # of `files`, which gives advice of its own
        error = error.__cause__ or error
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


def damaged(folder: Path, sums: dict[str, int]) -> list[str]:
    """The files of a checkpoint that have wrong sums or cannot be read."""
    wrong = []
    for name, known in sums.items():
        try:
            whole = _sums(folder, name).get(name) == known
        except OSError:
            whole = False
        wrong += [] if whole else [name]
    return wrong


def _changed(names: list[str]) -> str | None:
    return f"{', '.join(names)} changed since it was written" if names else None


def _gone(checkpoint: Path) -> Path:
    """A name for a checkpoint that is to be removed, so that nobody takes it for a complete one."""
    return checkpoint.with_name(f".{checkpoint.name}.{uuid.uuid4().hex}.gone")


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
