"""Images to shards: latent moments and discrete tokens of both flips, so that training runs no codec."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from streaming import LocalDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import save_image
from tqdm import tqdm

from mixar import __version__
from mixar.codecs import VAE, Tokenizer, from_bytes, posterior
from mixar.config import Config
from mixar.data.images import BrokenImageError, ImageSet, ImageSource
from mixar.data.manifest import FORMAT, Manifest, check_manifest, read_manifest
from mixar.data.parts import SIZE, Parts, Row, local_folder
from mixar.data.pixels import DECODING
from mixar.data.remote import MANIFEST
from mixar.data.workers import started, watching
from mixar.errors import UserError
from mixar.files import replacing, write_json
from mixar.signals import STOPPING, held_back
from mixar.weights import fingerprint

__all__ = ["Manifest", "check_manifest", "planned_manifest", "prepare", "read_manifest", "verify"]

BATCH = 32  # images encoded together, each in both flips


def prepare(
    cfg: Config,
    images: ImageSet,
    vae: VAE,
    tokenizer: Tokenizer,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    part_size: int = SIZE,
) -> Manifest:
    """Encode `images` into MDS shards at `cfg.data.shards`; when called again, it resumes.

    One row per image: `moments` float16 [2, 2C, h, w] and `codes` [2, N], plain and mirrored, `label` and `key`.
    Ranks need no process group: each starts with its own parts, takes others that are missing, and returns when the
    set is complete.

    Args:
        vae: frozen, in eval mode; it is moved to `device`. Likewise `tokenizer`.
        progress: show a bar on rank 0.
        part_size: images per part, the unit of resumption.

    Raises:
        UserError: a target that is remote, cannot be written or holds shards made from something else; more broken
            images than `data.max_broken` allows; latents that are not finite.
        PassingError: missing parts of other ranks, on a disk without locks.
    """
    folder = local_folder(cfg.data.shards)
    planned = planned_manifest(cfg, images, vae, tokenizer)
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "images": images.fingerprint,
        "decoding": DECODING,
        "image_size": cfg.data.image_size,
        "vae": planned.vae,
        "tokenizer": planned.tokenizer,
    }
    parts = Parts(folder, recipe, len(images), part_size)
    if not parts.todo() and (folder / MANIFEST).is_file():
        manifest = read_manifest(cfg.data.shards)
        tqdm.write(f"{folder} is complete: {manifest.count} images, nothing to do", file=sys.stderr)
        return manifest
    if left_out := images.left_out():
        tqdm.write(left_out, file=sys.stderr)

    encoder = _Encoder(cfg, images, planned, vae.to(device), tokenizer.to(device), device)
    encoder.broken = _joined("broken", parts.summaries())
    parts.write(rank, world, encoder.columns, encoder.rows_of, progress and rank == 0)
    manifest = _measured(planned, parts.close())
    check_broken(cfg, images, manifest.broken)
    write_json(folder / MANIFEST, vars(manifest))
    return manifest


def planned_manifest(cfg: Config, images: ImageSet, vae: VAE, tokenizer: Tokenizer) -> Manifest:
    """The manifest of a set before it is made: all but counts and statistics."""
    return Manifest(
        format=FORMAT,
        mixar=__version__,
        count=len(images),
        classes=images.classes,
        class_counts=[],
        image_size=cfg.data.image_size,
        crop="adm",
        grid=cfg.data.image_size // vae.config.stride,
        code_grid=cfg.data.image_size // tokenizer.config.stride,
        latent_channels=vae.config.latent_channels,
        code_bits=tokenizer.config.bits,
        vae=fingerprint(vae.state_dict()),
        vae_weights=cfg.vae.weights,
        tokenizer=fingerprint(tokenizer.state_dict()),
        tokenizer_weights=cfg.tokenizer.weights,
        latent_mean=[],
        latent_std=[],
        broken=[],
        skipped={reason: len(keys) for reason, keys in images.skipped.items()},
    )


def _measured(planned: Manifest, summaries: list[dict[str, Any]]) -> Manifest:
    """The manifest of a finished set, from the summaries of all parts."""
    counts = np.sum([part["class_counts"] for part in summaries], axis=0)
    # summed in the order of the parts, so that no digit depends on which rank wrote them
    sums = np.sum([[part["sum"], part["squares"]] for part in summaries], axis=0)
    mean, square = sums / (counts.sum() * planned.grid**2)
    return replace(
        planned,
        count=int(counts.sum()),
        class_counts=counts.tolist(),
        latent_mean=mean.tolist(),
        latent_std=np.sqrt(square - mean**2).tolist(),
        broken=_joined("broken", summaries),
    )


def check_broken(cfg: Config, images: ImageSet, broken: list[str]) -> None:
    """Raises UserError for more broken images than `data.max_broken` allows."""
    if len(broken) > cfg.data.max_broken * len(images):
        raise UserError(
            f"{len(broken)} of {len(images)} images are broken, more than data.max_broken="
            f"{cfg.data.max_broken:g} of the set: {', '.join(broken[:5])}. "
            "Replace them, or write a larger data.max_broken"
        )


class _Encoder:
    """Encodes images into rows of shards, and sums up what the manifest needs."""

    def __init__(self, cfg: Config, images: ImageSet, planned: Manifest, vae: VAE, tokenizer: Tokenizer, device: Any):
        self.cfg, self.images, self.vae, self.tokenizer, self.device = cfg, images, vae, tokenizer, device
        self.broken: list[str] = []  # keys in all parts so far
        self.code_dtype = code_dtype(planned.code_bits)
        self.columns = {
            "moments": f"ndarray:float16:2,{2 * planned.latent_channels},{planned.grid},{planned.grid}",
            "codes": f"ndarray:{self.code_dtype}:2,{planned.code_grid**2}",
            "label": "int",
            "key": "str",
        }

    def rows_of(self, ranges: Iterator[range]) -> Iterator[tuple[range, Iterator[Row], dict[str, Any]]]:
        """The rows of the readable images of each range, and a summary that is complete once all rows are taken."""
        ranges, ahead = tee(ranges)
        batches = self._read(ahead)
        for indices in ranges:
            summary: dict[str, Any] = {}
            yield indices, self._rows(islice(batches, -(-len(indices) // BATCH)), summary), summary

    def _read(self, ranges: Iterator[range]) -> Iterator[list[Any]]:
        """Batches of items, none across two ranges, which one set of workers reads ahead."""
        batches = (list(rows[first : first + BATCH]) for rows in ranges for first in range(0, len(rows), BATCH))
        items = _Tolerant(ImageSource(self.images, self.cfg.data.image_size))
        loader = DataLoader(items, batch_sampler=batches, num_workers=self.cfg.data.workers, collate_fn=list)
        with _signals_delayed():
            read, workers = started(loader)
        with watching(workers):
            yield from read

    def _rows(self, batches: Iterator[list[Any]], summary: dict[str, Any]) -> Iterator[Row]:
        channels = self.vae.config.latent_channels
        total, squares = np.zeros(channels), np.zeros(channels)
        counts, broken_before = np.zeros(len(self.images.classes), int), len(self.broken)
        for batch in batches:
            self._note_broken([item for item in batch if isinstance(item[0], BrokenImageError)])
            batch = [item for item in batch if not isinstance(item[0], BrokenImageError)]
            if not batch:
                continue
            pixels, labels, keys = zip(*batch)
            moments, codes = self._encode(torch.stack(pixels))
            mean, std = (value.double() for value in posterior(torch.from_numpy(moments[:, 0])))
            total += mean.sum((0, 2, 3)).numpy()
            squares += (mean**2 + std**2).sum((0, 2, 3)).numpy()
            counts += np.bincount(labels, minlength=len(counts))
            for row in zip(moments, codes, labels, keys):
                yield dict(zip(("moments", "codes", "label", "key"), row))
        summary.update(
            class_counts=counts.tolist(),
            sum=total.tolist(),
            squares=squares.tolist(),
            broken=self.broken[broken_before:],
        )

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> tuple[NDArray, NDArray]:
        """uint8 [B, 3, H, W] to moments [B, 2, 2C, h, w] and codes [B, 2, N]."""
        plain = from_bytes(pixels.to(self.device))
        both = rearrange([plain, plain.flip(-1)], "f b c h w -> (b f) c h w")
        moments = rearrange(self.vae.encode(both).half().cpu(), "(b f) c h w -> b f c h w", f=2).numpy()
        codes = rearrange(self.tokenizer.encode(both).cpu(), "(b f) n -> b f n", f=2).numpy()
        if not np.isfinite(moments).all():
            raise UserError("the VAE gives latents that are not finite in float16: check vae.weights")
        return moments, codes.astype(self.code_dtype)

    def _note_broken(self, found: list[tuple[BrokenImageError, str]]) -> None:
        for error, _ in found:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        self.broken += [key for _, key in found]
        check_broken(self.cfg, self.images, self.broken)


class _Tolerant(Dataset):
    """Items of an image source; for a broken image, its error and its key."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __getitem__(self, i: int) -> tuple[Tensor, int, str] | tuple[BrokenImageError, str]:
        try:
            return self.source[i]
        except BrokenImageError as error:
            return error, self.source.images.keys[i]


@contextmanager
def _signals_delayed() -> Iterator[None]:
    """Delay the signals that ask for an end until the block is over; workers that start in it never get them."""
    came: list[int] = []
    # torch's own threads receive what this one holds back
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOPPING}
    try:
        with held_back():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for late in came:
        signal.raise_signal(late)


def code_dtype(bits: int) -> str:
    """The smallest dtype for ids of `bits` bits that MDS and torch have in common."""
    return "uint16" if bits <= 16 else "int32"


def _joined(key: str, parts: list[dict[str, Any]]) -> list[Any]:
    return [value for part in parts for value in part[key]]


@torch.inference_mode()
def verify(shards: str, vae: VAE, tokenizer: Tokenizer, out_png: str | Path, count: int = 16) -> None:
    """Decode `count` images spread over a local set to a PNG, for a visual check.

    Rows: the decoded mean of the VAE, the same for the mirrored image, and the decoded codes of the tokenizer.
    """
    dataset = LocalDataset(shards)
    spread = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    rows = [dataset[int(index)] for index in spread]
    device = next(vae.parameters()).device
    moments = torch.from_numpy(np.stack([row["moments"] for row in rows])).to(device)
    codes = torch.from_numpy(np.stack([row["codes"][0].astype(np.int64) for row in rows])).to(device)
    decoded = [vae.decode(posterior(moments[:, flip])[0]) for flip in (0, 1)]
    shown = torch.cat([*decoded, tokenizer.to(device).decode(codes)]).clamp(0, 1)
    with replacing(out_png) as part:
        save_image(shown, part, format="png", nrow=len(rows))
