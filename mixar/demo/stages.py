"""A demo's folder, and the stages that train all networks of MixAR in it on small images."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixar import dist, resources
from mixar.codecs import load_tokenizer, load_vae
from mixar.config import Config, load_config, to_dict
from mixar.data.images import ImageSet, ImageSource, open_images, split, training_images
from mixar.data.shards import prepare
from mixar.demo.budget import LEAST, PROBE, SHARES, START, Survey, pace, rate_of, seconds_of
from mixar.demo.classifier import train_classifier
from mixar.errors import UserError
from mixar.evaluation.classifier import Classifier, save_classifier
from mixar.evaluation.extractors import Extractor, make_extractor
from mixar.evaluation.scores import Features, accumulate
from mixar.files import check_writable, write_json
from mixar.sampling import MixARPipeline
from mixar.train import train
from mixar.weights import newest_export

CONFIGS = resources.CONFIGS / "demo"
SIZE = 32  # pixels along the side of a demo's images
DIGITS = 4500  # training images of the built-in set, for which the configs' epochs were chosen
LEAST_OF_A_CLASS = 4  # images, so that some are held out and some to learn from
FEWEST = 200  # samples to score
UNITS = {"classifier": "steps", "samples": "samples"}  # of what a stage does
MADE_OF = "made_of.json"  # images, length and configs of the folder's models
NETWORKS = ("vae", "tokenizer", "prior", "mixar")  # each has a config
RECIPE = ("model", "mask", "ti_mix", "optim", "train", "sample")  # further sections that shape them


@dataclass
class Length:
    """The length of a demo: the share of each config's epochs, and the number of samples scored."""

    codecs: float = 1.0
    prior: float = 1.0
    mixar: float = 1.0
    classifier_steps: int = 400
    images: int = 100_000  # used of the set at most
    samples: int = 2000

    def of(self, network: str) -> float:
        """The share of its config's epochs that a network trains for."""
        return {"prior": self.prior, "mixar": self.mixar}.get(network, self.codecs)


SHORT = Length(codecs=0.05, prior=0.05, mixar=0.03, classifier_steps=60, images=1000, samples=100)


@dataclass
class Demo:
    """A demo's folder and its finished stages.

    Args:
        out: the folder.
        images: a folder of images, or the name of a built-in set.
        length: of its stages, where they do not depend on `minutes`.
        minutes: of all stages together, by the measured speed of this machine.
        stages: seconds of each finished stage; read from the folder.
        chosen: how long each stage was made, in `minutes`; read from the folder.

    Raises:
        UserError: a folder that cannot be written or that holds another demo, too few images or minutes.
    """

    out: Path
    images: str
    length: Length
    minutes: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_writable(self.out / MADE_OF)
        self.device = dist.find().device
        self.precision = dist.fast_precision(self.device)
        whole = open_images(
            load_config(CONFIGS / "vae.yaml", [f"data.images={self.images}", "data.classes=100000"]).data
        )
        if len(whole) < 40:
            raise UserError(f"{self.images} holds {len(whole)} images: give at least 40, better hundreds")
        sizes = torch.tensor(whole.labels).bincount(minlength=len(whole.classes))
        if sizes.min() < LEAST_OF_A_CLASS:
            raise UserError(
                f"{self.images} holds {sizes.min()} images of the class {whole.classes[int(sizes.argmin())]}: "
                f"give each class at least {LEAST_OF_A_CLASS}, or put all into one folder without classes"
            )
        self.classes = len(whole.classes)
        self.count = min(len(whole) - min(500, len(whole) // 10), self.length.images)
        self.held_out = len(whole) - self.count
        self.survey = Survey.of(whole, SIZE)
        self.configs = CONFIGS / "photos" if self.survey.photographs else CONFIGS
        self._claim(digest(whole))
        self.stages, self.chosen = _read(self.out / "stages.json"), _read(self.out / "chosen.json")
        self._check_minutes()
        print(f"{self.images}: {len(whole)} images in {self.classes} classes, {self.survey}\nnetworks: {self.configs}")

    def _check_minutes(self) -> None:
        """Refuse minutes that the finished stages have used up, or that are too few for the others."""
        left = LEAST * sum(share for name, share in SHARES.items() if name not in self.stages)
        gone = sum(self.stages.values()) / 60
        if self.minutes is not None and left and self.minutes < gone + left:
            done = f", of which {gone:.1f} minutes are done" if gone else ""
            raise UserError(
                f"--minutes {self.minutes:g} cannot hold the stages of the demo in {self.out}{done}: write "
                f"--minutes {math.ceil(gone + left)} or more"
            )

    def _claim(self, images: str) -> None:
        """Record what the demo in this folder is made of.

        Args:
            images: the digest of the set.

        Raises:
            UserError: the folder holds a demo of other images, another length or other configs.
        """
        configs = {name: to_dict(load_config(self.configs / f"{name}.yaml")) for name in NETWORKS}
        recipes = {name: {part: config[part] for part in (*NETWORKS[:3], *RECIPE)} for name, config in configs.items()}
        now = json.loads(json.dumps({"images": images, "length": asdict(self.length), "configs": recipes}))
        before = _read(self.out / MADE_OF)
        if other := [key for key in now if key in before and _differs(before[key], now[key])]:
            raise UserError(
                f"{self.out} holds a demo of other {', '.join(other)}: name another folder with --out, or remove it"
            )
        write_json(self.out / MADE_OF, now)

    def config(self, name: str, share: float, *overrides: str) -> Config:
        """The config of the network `name` for this folder and set: the images that it sees depend on `share` alone."""
        stretch = share * DIGITS / self.count
        base = load_config(self.configs / f"{name}.yaml")
        epochs = {
            "train.epochs": base.train.epochs,
            "train.checkpoint_every": base.train.checkpoint_every,
            "optim.warmup_epochs": base.optim.warmup_epochs,
            "ti_mix.start_epoch": base.ti_mix.start_epoch,
            "ti_mix.duration_epochs": base.ti_mix.duration_epochs,
        }
        exports = {f"{kind}.weights": self.newest_export(kind) for kind in ("vae", "tokenizer", "prior")}
        return load_config(self.configs / f"{name}.yaml", [
            f"run_dir={self.out / name}", f"data.images={self.images}", f"data.shards={self.out / 'shards'}",
            f"data.classes={self.classes}", f"data.held_out={self.held_out}", f"data.flip={self.survey.mirrored}",
            f"train.precision={self.precision}",
            *(f"{key}={value * stretch}" for key, value in epochs.items()),
            *(f"{key}={path}" for key, path in exports.items() if path is not None and not key.startswith(name)),
            *overrides,
        ])  # fmt: skip

    def newest_export(self, kind: str) -> Path | None:
        """The export of the stage `kind`; None before it has finished."""
        return newest_export(self.out / kind)

    def export_of(self, kind: str) -> Path:
        """The export of a finished stage. UserError where it was removed since."""
        export = self.newest_export(kind)
        if export is None:
            raise UserError(f"{self.out / kind} has lost its export: remove {self.out} and run the demo again")
        return export

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Time a stage. Gives False where an earlier run has finished it."""
        if name in self.stages:
            yield False
            return
        print(f"\n== {name}", flush=True)
        begun = time.monotonic()
        yield True
        self.stages[name] = round(time.monotonic() - begun, 1)
        write_json(self.out / "stages.json", self.stages)

    def train(self, name: str) -> None:
        """Train the network `name`."""
        with self.stage(name) as todo:
            if todo:
                train(self.config(name, self.share(name)))

    def share(self, name: str) -> float:
        """The share of its config's epochs that the network `name` trains for."""
        if self.minutes is None:
            return self.length.of(name)
        cfg = self.config(name, 1.0)
        whole = cfg.train.epochs * self.count
        images = self._in_time(name, lambda: pace(self.config(name, PROBE * cfg.train.batch / whole)))
        return max(images, PROBE * cfg.train.batch) / whole

    def _in_time(self, name: str, measure: Callable[[], float]) -> int:
        """How many steps or images a stage does in its part of the minutes, as chosen when it first began.

        Args:
            measure: gives the stage's rate per second on this machine.
        """
        assert self.minutes is not None
        if name not in self.chosen:
            seconds, begun = seconds_of(name, self.minutes, self.stages), time.monotonic()
            rate = measure()
            left = max(0.0, seconds - START - (time.monotonic() - begun))
            self.chosen[name] = {"seconds": round(seconds, 1), "per_second": round(rate, 2), "count": int(rate * left)}
            write_json(self.out / "chosen.json", self.chosen)
        count, rate, seconds = (self.chosen[name][key] for key in ("count", "per_second", "seconds"))
        print(f"{name}: {count:,} {UNITS.get(name, 'images')} at {rate:.1f} per second, in {seconds:.0f} s", flush=True)
        return int(count)

    def prepare_all(self) -> None:
        """Run all stages that MixAR needs: classifier, codecs, shards, prior."""
        with self.stage("classifier") as todo:
            if todo and not self.extractor_path.exists():
                save_classifier(self.extractor_path, *self._classifier())
        self.train("vae")
        self.train("tokenizer")
        with self.stage("shards") as todo:
            if todo:
                cfg = self.config("prior", 1.0)
                prepare(cfg, training_images(cfg.data), load_vae(cfg.vae), load_tokenizer(cfg.tokenizer), self.device)
        self.train("prior")

    def _classifier(self) -> tuple[Classifier, float]:
        """A trained classifier and its accuracy on held-out images."""
        images, labels = pixels(self.image_set("train"), SIZE)
        recipe: dict[str, Any] = {"flip": self.survey.mirrored}
        if self.survey.photographs:
            recipe |= {"width": 32, "reach": SIZE // 8}
        fit = partial(train_classifier, images, labels, self.classes, **recipe)
        if self.minutes is None:
            return fit(steps=self.length.classifier_steps)

        steps = self._in_time("classifier", lambda: rate_of(PROBE, lambda: fit(steps=PROBE)))
        return fit(steps=max(PROBE, steps))

    @property
    def extractor_path(self) -> Path:
        return self.out / "classifier"

    def image_set(self, part: str) -> ImageSet:
        """The images of `part`: `train`, or `held` out of the training."""
        cfg = self.config("vae", 1.0).data
        return split(open_images(cfg), cfg.held_out, seed=0)[0 if part == "train" else 1]

    def pipeline(self, name: str = "mixar") -> MixARPipeline:
        """The pipeline of the export of stage `name`."""
        return MixARPipeline.from_pretrained(self.export_of(name), self.device, self.precision)

    def scoring(self) -> tuple[Extractor, Features]:
        """The classifier as a feature extractor, and its features of the training images."""
        extractor = make_extractor(str(self.extractor_path), self.device)
        images, _ = pixels(self.image_set("train"), SIZE)
        return extractor, accumulate(images.split(256), extractor)

    def samples(self, pipeline: MixARPipeline) -> int:
        """How many samples are drawn and scored."""
        if self.minutes is None:
            return self.length.samples
        few = self.labels_and_seeds(FEWEST)
        count = self._in_time("samples", lambda: rate_of(FEWEST, lambda: pipeline(*few)))
        return min(max(FEWEST, count), self.length.samples)

    def labels_and_seeds(self, count: int) -> tuple[Tensor, Tensor]:
        """All classes in turn, and seeds 0, 1, ...: int64 [count] each."""
        seeds = torch.arange(count)
        return seeds % self.classes, seeds


def digest(images: ImageSet) -> str:
    """SHA-256 of a set's labels and the content of its images, independent of their names.

    Raises:
        UserError: an image that cannot be read.
    """
    total = hashlib.sha256(json.dumps(images.labels).encode())
    for item in images.items:
        try:
            content = item.tobytes() if isinstance(item, np.ndarray) else item.read_bytes()
        except OSError as error:
            raise UserError(f"image {item} cannot be read ({error.strerror}): replace it or take it out") from None
        total.update(len(content).to_bytes(8) + content)
    return total.hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """A record of the demo; empty where there is none yet. UserError for a damaged one."""
    try:
        record = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{file} is not what the demo wrote: remove {file.parent} and run the demo again")
    return record


def _differs(before: Any, now: Any) -> bool:
    """Whether two records differ in entries that both have; paths of weights do not count."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_differs(before[key], now[key]) for key in now if key in before and key != "weights")
    return bool(before != now)


def pixels(images: ImageSet, size: int) -> tuple[Tensor, Tensor]:
    """All images cropped, uint8 [n, 3, size, size], and their labels [n]."""
    source = ImageSource(images, size)
    return torch.stack([source[i][0] for i in range(len(source))]), torch.tensor(images.labels)
