"""The manifest beside a set of shards: what they were made from, and whether a run fits them."""

import json
import logging
import math
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from mixar.config import Config
from mixar.errors import PassingError, UserError
from mixar.files import replacing

FORMAT = 1
MANIFEST = "manifest.json"
PART = "part.json"  # in each part of a set, finished or not
WAITS = (1, 4, 16, 60)  # seconds between the tries of a remote that has answered before


@dataclass(frozen=True)
class Manifest:
    """A finished set of shards.

    Attributes:
        format: of the shards' columns and of this file.
        mixar: the version that wrote it.
        count: images, without the broken ones.
        classes: names, and images of each in `class_counts`.
        image_size: side in pixels after the `crop`.
        grid: latent cells along a side; `code_grid`: discrete tokens along a side.
        vae: fingerprint of the weights; `vae_weights`: the path they came from. Likewise `tokenizer`.
        latent_mean: a channel, of posterior samples of the images as they are, over set and positions; so `latent_std`.
        broken: keys of the images that could not be read.
        skipped: how many files and folders were left out of the images' folder, by reason.
    """

    format: int
    mixar: str
    count: int
    classes: list[str]
    class_counts: list[int]
    image_size: int
    crop: str
    grid: int
    code_grid: int
    latent_channels: int
    code_bits: int
    vae: str
    vae_weights: str | None
    tokenizer: str
    tokenizer_weights: str | None
    latent_mean: list[float]
    latent_std: list[float]
    broken: list[str]
    skipped: dict[str, int] = field(default_factory=dict)


def fetch(shards: str, cache: str | None, name: str) -> Path:
    """The local path of file `name` of a set; with a cache, the file is downloaded into it first.

    A remote that has answered before is asked again for a while when it fails, since a run should outlive an outage.
    The file lock holds between the ranks and workers of a node and between unrelated jobs, and ends with its holder.

    Args:
        shards: a local folder, or with `cache` any URL that streaming takes.
        cache: a local folder of its own for each set.

    Raises:
        UserError: a URL without a cache, a file that is missing; PassingError: one that cannot be fetched.
    """
    if cache is None and ":/" in shards:
        raise UserError(f"data.shards={shards} is remote: write data.cache=FOLDER, where shards are kept once read")
    path = Path(cache or shards, name)
    if path.is_file():
        return path
    if cache is None:
        verb = "`mixar prepare --pre-draw`" if "/" in name else "`mixar prepare`"
        made = _progress(path.parent, verb) or f"make the shards with {verb}, or write data.shards=FOLDER"
        raise UserError(f"{path} is missing: {made}")
    waits = list(WAITS) if Path(cache, MANIFEST).is_file() else []
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    with replacing(path) as aside:
                        _download(shards, name, aside)
            return path
        except Exception as error:  # each kind of storage fails with errors of its own
            told = f"cannot fetch {shards.rstrip('/')}/{name} to {path} ({error})"
            if not waits:
                raise PassingError(f"{told}: check data.shards and data.cache") from None
            logging.getLogger("mixar").warning("%s, trying again in %g s", told, waits[0])
            time.sleep(waits.pop(0))


def _progress(folder: Path, verb: str) -> str:
    """How far `verb` got with the set in `folder`; empty where it wrote nothing."""
    if not (written := sorted(folder.glob(f"part-*/{PART}"))):
        return ""
    whole = json.loads(written[0].read_text()).get("parts", "more")
    return f"{len(written)} of {whole} parts are written, run {verb} again as before for the rest"


def _download(shards: str, name: str, to: Path) -> None:
    from streaming.base.storage import CloudDownloader  # takes seconds to import, and only remote files need it here

    CloudDownloader.direct_download(f"{shards.removeprefix('file://').rstrip('/')}/{name}", str(to))


def check_cache(shards: str, cache: str | None) -> None:
    """Refuse a cache of a remote set that was made anew since.

    A remote that cannot be asked now is taken as unchanged: the cache may hold all that is needed.

    Raises:
        UserError: the remote's index differs from the cached one.
    """
    kept = Path(cache or shards, "index.json")
    if cache is None or not kept.is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            _download(shards, kept.name, Path(folder, kept.name))
        except Exception as error:  # each kind of storage fails with errors of its own
            logging.getLogger("mixar").warning("%s cannot be compared with its cache (%s)", shards, error)
            return
        if Path(folder, kept.name).read_bytes() != kept.read_bytes():
            raise UserError(
                f"{shards} was made anew since it was cached: rm -r {shlex.quote(cache)}, then it is fetched again"
            )


def read_manifest(shards: str, cache: str | None = None) -> Manifest:
    """The manifest of the shards at `shards`; arguments as in `fetch`.

    Raises:
        UserError: none there, a broken one, or one of another format.
    """
    path = fetch(shards, cache, MANIFEST)
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise UserError(f"{path} has format {values['format']}, not {FORMAT}: `mixar prepare` another folder")
        return Manifest(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and run `mixar prepare` again") from None


def check_manifest(manifest: Manifest, config: Config) -> None:
    """Refuse a config that does not fit the shards.

    Raises:
        UserError: the first mismatch, with the override to write.
    """
    levels: Callable[[int], int] = lambda grid: int(math.log2(manifest.image_size // grid)) + 1
    for what, found, wanted, mend in (
        ("image size", manifest.image_size, config.data.image_size, f"data.image_size={manifest.image_size}"),
        ("classes", len(manifest.classes), config.data.classes, f"data.classes={len(manifest.classes)}"),
        ("latent channels", manifest.latent_channels, config.vae.latent_channels,
         f"vae.latent_channels={manifest.latent_channels}"),
        ("bits a code", manifest.code_bits, config.tokenizer.bits, f"tokenizer.bits={manifest.code_bits}"),
        ("latent grid", manifest.grid, config.vae.grid, f"vae.multipliers with {levels(manifest.grid)} entries"),
        ("code grid", manifest.code_grid, config.tokenizer.grid,
         f"tokenizer.multipliers with {levels(manifest.code_grid)} entries"),
    ):
        if found != wanted:
            raise UserError(
                f"the shards in {config.data.shards} have {what} {found}, the config {wanted}: write {mend}, "
                "or data.shards=FOLDER of shards that fit"
            )


def check_pre_drawn(recipe: dict[str, Any], manifest: Manifest, config: Config) -> None:
    """Refuse tokens that were drawn beforehand for other shards or under other settings.

    Args:
        recipe: what `mixar prepare --pre-draw` wrote beside them.

    Raises:
        UserError: the first mismatch.
    """
    for what, found, wanted in (
        ("the tokenizer", recipe["tokenizer"], manifest.tokenizer),
        ("the count of images", recipe["count"], manifest.count),
        ("mask.minimum and mask.std", recipe["mask"], [config.mask.minimum, config.mask.std]),
        ("ti_mix.draw", recipe["draw"], config.ti_mix.draw),
        ("data.flip", recipe["flip"], config.data.flip),
    ):
        if found != wanted:
            again = shlex.join(["rm", "-r", f"{config.data.shards}/ti_mix"])
            raise UserError(
                f"TI-Mix's tokens beside {config.data.shards} were drawn with {what} {found}, now it is {wanted}: "
                f"write what they were drawn with, or {again} and run `mixar prepare --pre-draw` again"
            )
