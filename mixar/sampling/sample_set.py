"""What `sample` and `evaluate` share: samples that flags ask for, and a folder that says how they were drawn."""

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mixar.command_line import FLAGS, flag
from mixar.config import PRESETS, SampleConfig, load_config, to_dict
from mixar.data.image_batches import write_npz
from mixar.errors import UserError
from mixar.files import replacing, sync, write_json
from mixar.model import Diffusion
from mixar.process import check_writable
from mixar.sampling import MixARPipeline, find_export
from mixar.weights import fingerprint, is_export

RECORD = "sampling.json"
NPZ = "samples.npz"
PARTS = ".samples"  # folder of what is drawn already of an npz, a batch a file
LONGEST = 245  # bytes of a name: file systems take 255, and endings are put to it


@dataclass(frozen=True)
class Drawing:
    """Samples to draw: `count` images of the classes `turn` in turn, seeds one after the other.

    Attributes:
        path: of the run directory or the export.
        pipeline: with the settings to draw by.
        released: the export's own settings.
        weights: the fingerprint of each network.
        classes: `turn` as --labels gave it.
        asked: what the settings to draw by change of the export's: fields of `SampleConfig`, and `preset`.
    """

    path: Path
    pipeline: MixARPipeline
    released: SampleConfig
    weights: dict[str, str]
    turn: list[int]
    classes: str | None
    count: int
    asked: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace, count: int | None = None) -> "Drawing":
        """What the flags ask for; by default `count` images, or one of each class in turn where that is None.

        Raises:
            UserError: no export at `args.path`, or a flag that cannot be followed.
        """
        if args.count is not None and args.count < 1:
            raise UserError(f"--count {args.count} draws nothing: write --count 1 or more")
        asked = {name: getattr(args, name) for name in ("preset", *FLAGS) if getattr(args, name) is not None}
        turn = None if args.labels is None else parse_labels(args.labels)
        with naming(lambda name: f"{flag(name)} "):
            check_settings(asked)
            pipeline = MixARPipeline.from_pretrained(args.path, precision=args.precision, compile=args.compile)
            weights = {name: fingerprint(network.state_dict()) for name, network in pipeline.networks.items()}
            turn = turn or list(range(pipeline.model.config.classes))
            count = args.count or count or len(turn)
            released = cls(Path(args.path), pipeline, pipeline.settings, weights, turn, args.labels, count, {})
            return released.with_settings(**asked)

    def with_settings(self, **changes: Any) -> "Drawing":
        """As many images of the same classes under other settings: fields of `SampleConfig`, and `preset`.

        Raises:
            UserError: settings that do not go together.
        """
        asked = self.asked | changes
        fields = {name: value for name, value in asked.items() if name != "preset"}
        chosen = vars(self.released) | PRESETS.get(asked.get("preset", ""), {}) | fields
        return replace(self, pipeline=self.pipeline.with_settings(**chosen), asked=asked)

    @property
    def name(self) -> str:
        """Of the folder; drawings that differ in what was asked for have different names."""
        parts = [f"{self.pipeline.settings.seed}-{self.count}"]
        parts += [f"labels-{self.classes}"] if self.classes else []
        parts += [self.asked["preset"]] if "preset" in self.asked else []
        said = [name for name in FLAGS if name in self.asked and name not in ("seed", "batch")]
        name = "-".join([*parts, *(f"{name}-{self.asked[name]}".replace(" ", "") for name in said)])
        whole = name.encode()
        if len(whole) > LONGEST:
            name = f"{whole[: LONGEST - 17].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:16]}"
        return name

    @property
    def folder(self) -> Path:
        """Where the samples lie by default."""
        return place(self.path, "samples") / self.name

    @property
    def labels(self) -> list[int]:
        """One an image."""
        return list(islice(cycle(self.turn), self.count))

    @property
    def seeds(self) -> list[int]:
        """One an image."""
        first = self.pipeline.settings.seed
        return list(range(first, first + self.count))

    @property
    def record(self) -> dict[str, Any]:
        """How the samples are drawn, as their folder says it. The export is told for who reads it: weights decide."""
        norm = self.pipeline.norm
        return {
            "export": str(find_export(self.path)),
            "weights": self.weights,
            "latents": fingerprint({"mean": norm.mean, "std": norm.std}),
            "dtype": self.pipeline.precision,
            "labels": self.turn,
            "count": self.count,
            "sampling": _without_batch(to_dict(self.pipeline.settings)),
        }

    def check(self) -> None:
        """Find before anything is drawn what `write(folder)` would refuse.

        Raises:
            UserError: settings or labels that this model cannot follow, or a folder of samples drawn otherwise or that
                cannot be written.
        """
        check_writable(self.folder / RECORD)
        self._refuse(self.folder)

    def write(self, folder: Path, watch: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter) -> list[Path]:
        """Draw those of the PNGs `<seed>-<label>.png` that `folder` does not hold yet; returns all, in order of seed.

        Args:
            watch: passes the drawn batches [B, 3, H, W] on, to see how long each takes.

        Raises:
            UserError: nothing can be written there, or the folder holds samples that were drawn otherwise.
        """
        self._claim(folder)
        files = [folder / name for name in sample_names(self.record)]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        if missing:
            labels, seeds = [self.labels[i] for i in missing], [self.seeds[i] for i in missing]
            images = chain.from_iterable(watch(self.pipeline.stream(labels, seeds, progress="samples")))
            for image, i in zip(images, missing):
                with replacing(files[i]) as part:
                    Image.fromarray(rearrange(image, "c h w -> h w c").numpy()).save(part, "PNG")
        return files

    def write_npz(self, folder: Path) -> Path:
        """Draw all into an npz of ADM's form, which appears whole. Otherwise as `write`.

        Until then each batch is kept in a file, so that the same command goes on after a kill; with batches of the same
        size, to the very bytes of an undisturbed npz.
        """
        self._claim(folder)
        file, parts = folder / NPZ, folder / PARTS
        if not file.exists():
            drawn = self._draw_parts(parts)
            images = (torch.from_numpy(np.load(part)) for part in drawn)
            write_npz(parts / NPZ, images, self.count, torch.tensor(self.labels))
            (parts / NPZ).rename(file)  # written in there, what a kill leaves of it goes with the parts
            sync(folder)
        shutil.rmtree(parts, ignore_errors=True)
        return file

    def _draw_parts(self, parts: Path) -> list[Path]:
        """Draw what is missing of the files `<first>.npy` of consecutive images [B, 3, H, W]; all of them, in order."""
        drawn, at = [], 0
        while (part := parts / f"{at}.npy").exists():
            drawn.append(part)
            at += len(np.load(part, mmap_mode="r"))
        if at < self.count:
            for images in self.pipeline.stream(self.labels[at:], self.seeds[at:], progress="samples"):
                drawn.append(parts / f"{at}.npy")
                with replacing(drawn[-1]) as aside, aside.open("wb") as file:
                    np.save(file, images.numpy())
                at += len(images)
        return drawn

    def _claim(self, folder: Path) -> None:
        """Write down how the samples in `folder` are drawn, unless it holds others."""
        self._refuse(folder)
        write_json(folder / RECORD, self.record)

    def _refuse(self, folder: Path) -> None:
        self.pipeline.checked(self.labels, self.seeds)
        if not (any(folder.glob("*.png")) or (folder / NPZ).exists() or (folder / PARTS).exists()):
            return
        before = read_record(folder)
        elsewhere = "remove it, or draw into another folder with `mixar sample --out`"
        if before is None:
            raise UserError(f"{folder} holds images of which nothing says how they were drawn: {elsewhere}")
        if other := differences(before, self.record):
            raise UserError(f"{folder} holds samples of other {', '.join(other)}: {elsewhere}")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two records tell differently of how samples are drawn. The older one may lack what is newer than it."""
    return [key for key in now if key != "export" and key in before and before[key] != now[key]]


def read_record(samples: Path) -> dict[str, Any] | None:
    """How the samples in a folder, or in the npz of one, were drawn; None where nothing says so.

    Raises:
        UserError: a record that `mixar sample` did not write.
    """
    folder = samples if samples.is_dir() else samples.parent
    file = folder / RECORD
    if not file.is_file() or (samples.is_file() and samples.name != NPZ):
        return None
    try:
        record = json.loads(file.read_text())
        told = record["export"], record["weights"], record["dtype"], record["labels"], record["count"]
        sampling = _without_batch(to_dict(SampleConfig()) | record["sampling"])  # newer settings were at their defaults
        kinds = [type(value) for value in (*told, sampling["seed"])]
        if kinds != [str, dict, str, list, int, int] or {type(label) for label in told[3]} != {int}:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not what `mixar sample` writes: remove it to take the images as they are") from None
    return record | {"sampling": sampling}


def sample_names(record: dict[str, Any]) -> dict[str, int]:
    """The name of each PNG that a record tells of, and its label."""
    first, labels = record["sampling"]["seed"], islice(cycle(record["labels"]), record["count"])
    return {f"{first + i}-{label}.png": label for i, label in enumerate(labels)}


def _without_batch(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "batch"}  # it changes the speed only


def place(path: Path, kind: str) -> Path:
    """Where what is made from `path` lies: inside a run directory, but beside an export."""
    whole = Path(os.path.abspath(path))  # '.' has no name
    return whole.with_name(f"{whole.name}-{kind}") if is_export(path) else path / kind


def parse_labels(text: str) -> list[int]:
    """`3,7,7` and `0-9` as class indices.

    Raises:
        UserError: neither.
    """
    try:
        ends = [part.partition("-") for part in text.split(",")]
        labels = [label for first, _, last in ends for label in range(int(first), int(last or first) + 1)]
    except ValueError:
        labels = []
    if not labels:
        raise UserError(f"--labels {text} names no classes: write such as --labels 3,7,7 or --labels 0-9")
    return labels


def parse_setting(name: str, text: str) -> Any:
    """The value of a sampling flag or of `preset`, as the command line reads it.

    Raises:
        UserError: no such value, or one out of range; told of `sample.<name>=`, see `naming`.
    """
    if name == "preset":
        if text not in PRESETS:
            raise UserError(f"sample.preset={text} is not known: write one of {', '.join(PRESETS)}")
        return text
    kind, _ = FLAGS[name]
    try:
        value = kind(text)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise UserError(f"sample.{name}={text} is not {number}: write such as sample.{name}=4") from None
    check_settings({name: value})
    return value


def check_settings(asked: dict[str, Any]) -> None:
    """Each setting by itself, whatever the model and the preset.

    Raises:
        UserError: a value out of the range that a config's `sample.<name>` has.
    """
    for name, value in asked.items():
        if name != "preset":
            load_config(None, ["task=vae", f"sample.{name}={value}"])  # of a vae: the model's limits are not known here
        if name == "diffusion_steps":
            Diffusion(value)


@contextmanager
def naming(how: Callable[[str], str]) -> Iterator[None]:
    """Mistakes in settings of sampling told as mistakes in what the user typed: `how(name)` for `sample.<name>=`."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"sample\.(\w+)=", lambda key: how(key[1]), str(error))) from None
