"""A set of samples on disk: PNGs or an npz, in a folder whose record says how they were sampled."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mixar.config import MOST_CLASSES, PRESETS, SampleConfig, to_dict
from mixar.data.npz import write_npz
from mixar.errors import UserError
from mixar.files import check_writable, replacing, sync, write_json
from mixar.sampling.pipeline import MixARPipeline
from mixar.sampling.record import NPZ, RECORD, differences, read_record, sample_names, without_batch
from mixar.weights import find_export, fingerprint, is_export

PARTS = ".samples"  # folder of the batches of an npz that is not complete yet
LONGEST = 245  # bytes of a name: file systems allow 255, and endings are added to it


@dataclass(frozen=True)
class SampleSet:
    """Samples to be written: `count` images of the classes `turn` in turn, with consecutive seeds.

    Attributes:
        path: the run directory or the export.
        pipeline: with the settings to sample with.
        released: the export's own settings.
        weights: the fingerprint of each network.
        classes: the text that `turn` was given as, such as 0-9.
        asked: the changes to `released`: fields of `SampleConfig`, and `preset`.
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
    def open(
        cls, path: str | Path, settings: dict[str, Any], labels: str | None = None, count: int | None = None,
        precision: str | None = None, compile: bool = False,
    ) -> "SampleSet":  # fmt: skip
        """Samples of the model at `path`. Precision and compile are those of `MixARPipeline`.

        Args:
            path: a run directory, whose newest export is taken, or an export.
            settings: fields of `SampleConfig`, and `preset`, that differ from the export's.
            labels: the classes to take in turn, such as `3,7,7` or `0-9`; by default all.
            count: the number of images; by default one of each class in turn.

        Raises:
            UserError: no export at `path`, labels that name no classes, or settings that do not go together.
        """
        turn = None if labels is None else parse_labels(labels)
        pipeline = MixARPipeline.from_pretrained(path, precision=precision, compile=compile)
        turn = turn or list(range(pipeline.model.config.classes))
        released = cls(
            Path(path), pipeline, pipeline.settings, pipeline.fingerprints, turn, labels, count or len(turn), {}
        )
        return released.with_settings(**settings)

    def with_settings(self, **changes: Any) -> "SampleSet":
        """As many images of the same classes under other settings: fields of `SampleConfig`, and `preset`.

        Raises:
            SettingError: settings that do not go together.
        """
        asked = self.asked | changes
        fields = {name: value for name, value in asked.items() if name != "preset"}
        chosen = vars(self.released) | PRESETS.get(asked.get("preset", ""), {}) | fields
        return replace(self, pipeline=self.pipeline.with_settings(**chosen), asked=asked)

    @property
    def name(self) -> str:
        """The folder's name: sets that differ in `count`, `classes` or `asked` have different ones."""
        parts = [f"{self.pipeline.settings.seed}-{self.count}"]
        parts += [f"labels-{self.classes}"] if self.classes else []
        parts += [self.asked["preset"]] if "preset" in self.asked else []
        named = [name for name in without_batch(vars(self.released)) if name in self.asked and name != "seed"]
        name = "-".join([*parts, *(f"{name}-{self.asked[name]}".replace(" ", "") for name in named)])
        whole = name.encode()
        if len(whole) > LONGEST:
            name = f"{whole[: LONGEST - 17].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:16]}"
        return name

    @property
    def folder(self) -> Path:
        """The default folder of the samples."""
        return output_folder(self.path, "samples") / self.name

    @property
    def labels(self) -> list[int]:
        """The class of each image."""
        return list(islice(cycle(self.turn), self.count))

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        first = self.pipeline.settings.seed
        return list(range(first, first + self.count))

    @property
    def record(self) -> dict[str, Any]:
        """The record of these samples. It names the export for its reader; the fingerprints of the weights decide."""
        norm = self.pipeline.norm
        return {
            "export": str(find_export(self.path)),
            "weights": self.weights,
            "latents": fingerprint({"mean": norm.mean, "std": norm.std}),
            "dtype": self.pipeline.precision,
            "labels": self.turn,
            "count": self.count,
            "sampling": without_batch(to_dict(self.pipeline.settings)),
        }

    def check(self) -> None:
        """Find out, before anything is sampled, whether `write(self.folder)` would be refused.

        Raises:
            UserError: settings or labels that this model cannot follow; a folder that cannot be written, or that holds
                samples of other settings.
        """
        check_writable(self.folder / RECORD)
        self._refuse(self.folder)

    def write(self, folder: Path, watch: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter) -> list[Path]:
        """Sample the PNGs `<seed>-<label>.png` that are missing in `folder`; returns all, in the order of their seeds.

        Args:
            watch: passes the batches [B, 3, H, W] on as they are sampled, to measure how long each takes.

        Raises:
            UserError: a folder that cannot be written, or that holds samples of other settings.
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
        """Sample all images into an npz in ADM's form, which appears whole or not at all. Otherwise as `write`.

        Until then each batch is kept in a file of its own, so that the same command resumes after a kill. With batches
        of the same size, the npz is byte for byte that of an undisturbed run.
        """
        self._claim(folder)
        file, parts = folder / NPZ, folder / PARTS
        if not file.exists():
            images = (torch.from_numpy(np.load(part)) for part in self._write_parts(parts))
            write_npz(parts / NPZ, images, self.count, torch.tensor(self.labels))
            (parts / NPZ).rename(file)  # written in there, so that what a kill leaves behind is removed with the parts
            sync(folder)
        shutil.rmtree(parts, ignore_errors=True)
        return file

    def _write_parts(self, parts: Path) -> list[Path]:
        """Sample what is missing of the files `<first>.npy`, consecutive images [B, 3, H, W]; all files, in order."""
        files, at = [], 0
        while (part := parts / f"{at}.npy").exists():
            files.append(part)
            at += len(np.load(part, mmap_mode="r"))
        if at < self.count:
            for images in self.pipeline.stream(self.labels[at:], self.seeds[at:], progress="samples"):
                files.append(parts / f"{at}.npy")
                with replacing(files[-1]) as aside, aside.open("wb") as file:
                    np.save(file, images.numpy())
                at += len(images)
        return files

    def _claim(self, folder: Path) -> None:
        """Write the record into `folder`, unless it holds other samples."""
        self._refuse(folder)
        write_json(folder / RECORD, self.record)

    def _refuse(self, folder: Path) -> None:
        self.pipeline.checked(self.labels, self.seeds)
        if not (any(folder.glob("*.png")) or (folder / NPZ).exists() or (folder / PARTS).exists()):
            return
        before = read_record(folder)
        elsewhere = "remove it, or write to another folder with `mixar sample --out`"
        if before is None:
            raise UserError(f"{folder} holds images without a record of how they were sampled: {elsewhere}")
        if other := differences(before, self.record):
            raise UserError(f"{folder} holds samples of other {', '.join(other)}: {elsewhere}")


def output_folder(path: Path, kind: str) -> Path:
    """The folder of what is made from the model at `path`: inside a run directory, but beside an export."""
    whole = Path(os.path.abspath(path))  # '.' has no name
    return whole.with_name(f"{whole.name}-{kind}") if is_export(path) else path / kind


def parse_labels(text: str) -> list[int]:
    """The class indices in a text such as `3,7,7` or `0-9`.

    Raises:
        UserError: a text that is neither, or classes beyond those that any model has.
    """
    try:
        ends = [part.partition("-") for part in text.split(",")]
        ranges = [range(int(first), int(last or first) + 1) for first, _, last in ends]
    except ValueError:
        ranges = []
    if any(labels and labels[-1] >= MOST_CLASSES for labels in ranges):  # before memory is spent on them
        raise UserError(f"--labels {text} goes beyond {MOST_CLASSES - 1}, the last class that a model can have")
    labels = [label for labels in ranges for label in labels]
    if not labels:
        raise UserError(f"--labels {text} names no classes: write such as --labels 3,7,7 or --labels 0-9")
    return labels
