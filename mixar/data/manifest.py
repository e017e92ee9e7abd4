"""The manifest of a set of shards: its sources and geometry, and the check that a config fits them."""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mixar.config import Config
from mixar.data.remote import MANIFEST, fetch
from mixar.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The description of a finished set of shards.

    Attributes:
        format: version of the shards' columns and of this file.
        mixar: the version of mixar that wrote it.
        count: images, without the broken ones.
        classes: names of the classes; `class_counts`: images of each.
        image_size: side in pixels after the `crop`.
        grid: latent cells along a side; `code_grid`: discrete tokens along a side.
        vae: fingerprint of the weights; `vae_weights`: the path they came from. Likewise `tokenizer`.
        latent_mean: per channel, over set and positions, of posterior samples of unmirrored images; so `latent_std`.
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


def read_manifest(shards: str, cache: str | None = None) -> Manifest:
    """The manifest of the shards at `shards`. Arguments as in `fetch`.

    Raises:
        UserError: a manifest that is missing, damaged or of another format.
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
        UserError: the first mismatch, with the override that fixes it.
    """
    levels: Callable[[int], int] = lambda grid: int(math.log2(manifest.image_size // grid)) + 1
    for what, found, wanted, fix in (
        ("image size", manifest.image_size, config.data.image_size, f"data.image_size={manifest.image_size}"),
        ("classes", len(manifest.classes), config.data.classes, f"data.classes={len(manifest.classes)}"),
        (
            "latent channels",
            manifest.latent_channels,
            config.vae.latent_channels,
            f"vae.latent_channels={manifest.latent_channels}",
        ),
        ("bits per code", manifest.code_bits, config.tokenizer.bits, f"tokenizer.bits={manifest.code_bits}"),
        ("latent grid", manifest.grid, config.latent_grid, f"vae.multipliers with {levels(manifest.grid)} entries"),
        (
            "code grid",
            manifest.code_grid,
            config.code_grid,
            f"tokenizer.multipliers with {levels(manifest.code_grid)} entries",
        ),
    ):
        if found != wanted:
            raise UserError(
                f"the shards in {config.data.shards} have {what} {found}, the config {wanted}: write {fix}, "
                "or data.shards=FOLDER of shards that fit"
            )


def check_pre_drawn(recipe: dict[str, Any], manifest: Manifest, config: Config) -> None:
    """Refuse pre-drawn tokens that belong to other shards or other settings.

    Args:
        recipe: the file that `mixar prepare --pre-draw` wrote beside them.

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
                f"the pre-drawn tokens in {config.data.shards} were made with {what} {found}, now it is {wanted}: "
                f"write the former value, or {again} and run `mixar prepare --pre-draw` again"
            )
