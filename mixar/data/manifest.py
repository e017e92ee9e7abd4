"""The manifest beside a set of shards: what they were made from, and whether a run fits them."""

import json
import logging
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mixar.config import Config
from mixar.errors import PassingError, UserError

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
    # streaming takes seconds to import, and only remote files need it here
    from filelock import FileLock
    from streaming.base.storage import CloudDownloader

    url = f"{shards.removeprefix('file://').rstrip('/')}/{name}"
    waits = list(WAITS) if Path(cache, MANIFEST).is_file() else []
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    aside = path.with_name(f"{path.name}.part")
                    aside.unlink(missing_ok=True)  # of a process that was killed
                    CloudDownloader.direct_download(url, str(aside))
                    aside.replace(path)
            return path
        except Exception as error:  # each kind of storage fails with errors of its own
            told = f"cannot fetch {url} to {path} ({error})"
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


def check_codecs(manifest: Manifest, vae_fingerprint: str, tokenizer_fingerprint: str) -> None:
    """Refuse codecs other than those that made the shards.

    Raises:
        UserError: a fingerprint (`mixar.weights.fingerprint`) that differs, with where the right weights were.
    """
    for name, made, given, weights in (
        ("vae", manifest.vae, vae_fingerprint, manifest.vae_weights),
        ("tokenizer", manifest.tokenizer, tokenizer_fingerprint, manifest.tokenizer_weights),
    ):
        if made != given:
            mend = f"write {name}.weights={shlex.quote(weights)}" if weights else f"give {name}.weights of that {name}"
            raise UserError(
                f"the shards were made with another {name} (fingerprint {made}, given {given}): "
                f"{mend}, or run `mixar prepare` with this one into another folder"
            )
