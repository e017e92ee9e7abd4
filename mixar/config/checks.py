"""Checks of a config: messages name the key and what to write instead. Nothing here reads the disk."""

import dataclasses
import math
import re
import unicodedata
from typing import Any

from mixar.config.knobs import JUDGED, LEVELS, CodecLosses, Config, SampleConfig
from mixar.config.passes import images_per_pass
from mixar.config.respacing import RESPACINGS, respaced_steps
from mixar.errors import SettingError, UserError

MOST_PROFILED = 100  # a step of a large model is megabytes of trace


def validate(config: Config) -> None:
    """Refuse a config that cannot work, with a message that names the key and what to write instead.

    Raises:
        UserError: the first impossible value or combination.
    """
    _check_each(config)
    _check_values(config)
    _check_networks(config)
    _check_tokens(config)
    _check_losses(config)
    profiled_steps(config.train.profile)
    images_per_pass(config, ranks=1)
    check_sample(config.sample)
    if config.task == "mixar":
        RESPACINGS[config.model.process](config.sample.diffusion_steps, config.sample.diffusion_start + 1)


def profiled_steps(profile: str | None) -> range:
    """The steps of `train.profile`, FIRST:COUNT; the first step of a run is 0.

    Raises:
        SettingError: another form, or too many steps.
    """
    if profile is None:
        return range(0)
    found = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,3})", profile)
    first, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= count <= MOST_PROFILED:
        raise SettingError(
            f"{{}} is not FIRST:COUNT, the first step and a number of steps from 1 to {MOST_PROFILED}: write {{}}, or "
            "leave it out",
            ("train.profile", profile), ("train.profile", "100:3"),
        )  # fmt: skip
    return range(first, first + count)


def check_sample(sample: SampleConfig) -> None:
    """Check sampling settings, each by itself and in combination.

    Raises:
        SettingError: a value is out of range, or settings exclude each other.
    """
    check_sample_values(sample)
    steps, end = sample.diffusion_steps, sample.diffusion_steps_end
    if end is not None and not (steps.isdecimal() and int(steps) >= end):
        raise SettingError(
            "{} is the last count of diffusion steps, so that {} must be a count of at least that: write {}",
            ("sample.diffusion_steps_end", end), ("sample.diffusion_steps", steps),
            ("sample.diffusion_steps", max(50, end)),
        )  # fmt: skip
    if sample.solver == "dpm" and (steps == "1" or end == 1):
        raise SettingError(
            "{} needs at least 2 diffusion steps: write {} or more",
            ("sample.solver", "dpm"), ("sample.diffusion_steps", 2),
        )  # fmt: skip
    if sample.solver == "dpm" and sample.temperature != 1:
        raise SettingError(
            "{} scales noise, and {} adds none: write {}, or {}", ("sample.temperature", sample.temperature),
            ("sample.solver", "dpm"), ("sample.temperature", 1), ("sample.solver", "ddpm"),
        )  # fmt: skip


def check_sample_values(sample: SampleConfig) -> None:
    """Check sampling settings, each by itself.

    Raises:
        SettingError: the first value that is out of range.
    """
    _check_each(sample, "sample.")
    interval = sample.cfg_interval
    if len(interval) != 2 or not interval[0] < interval[1]:
        raise SettingError(
            "{} must be two shares of the steps, from 0 to 1 and ascending, as in {}",
            ("sample.cfg_interval", interval), ("sample.cfg_interval", [0.25, 1]),
        )  # fmt: skip
    respaced_steps(sample.diffusion_steps)


def _check_each(section: Any, prefix: str = "") -> None:
    """Check each value of a section and its sub-sections against the range or the choices of its field."""
    for field in dataclasses.fields(section):
        key, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _check_each(value, f"{key}.")
        elif "choices" in field.metadata:
            if value not in (field.default, *field.metadata["choices"]):
                raise SettingError(
                    f"{{}} is not known: write one of {', '.join(field.metadata['choices'])}", (key, value)
                )
        elif isinstance(value, str):
            _check_text(key, value)
        elif key not in _FOLLOWS and value is not None and not isinstance(value, bool):
            low, high = field.metadata["limits"]
            numbers = value if isinstance(value, list) else [value]
            if not all(isinstance(number, int | float) and low <= number <= high for number in numbers):
                raise SettingError(f"{{}} is out of range: write a value from {low} to {high}", (key, value))


def _check_text(key: str, text: str) -> None:
    """Check a string: a path, a name or a respacing."""
    if not text.strip():
        raise SettingError("{} is empty: write {}, or leave it out", (key, ""), (key, "<value>"))
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise SettingError("{} has a control character or is not UTF-8: write another name", (key, repr(text)))


def _check_values(config: Config) -> None:
    """Check the lengths of lists, and values that must equal another one."""
    for key in ("vae.multipliers", "tokenizer.multipliers"):
        value = get(config, key)
        if not 1 <= len(value) <= LEVELS:
            raise UserError(
                f"{key}={value} must have a factor of the width for each of 1 to {LEVELS} levels, as in {key}=[1,2,4]"
            )
    tokenizer = config.tokenizer
    if tokenizer.kind != "maskbit" and tokenizer.code_dim is None:
        raise UserError(
            f"tokenizer.kind={tokenizer.kind} learns its codes: write tokenizer.code_dim=<channels>, such as 16"
        )
    if tokenizer.kind == "maskbit" and tokenizer.code_dim is not None:
        raise UserError(
            f"tokenizer.code_dim={tokenizer.code_dim} is for learned codes, not for tokenizer.kind=maskbit: "
            "leave tokenizer.code_dim out, or write tokenizer.kind=vq"
        )
    if len(config.optim.betas) != 2:
        raise UserError(f"optim.betas={config.optim.betas} must be two values, as in optim.betas=[0.9,0.95]")
    for key, source in _FOLLOWS.items():
        own, other = ("null" if value is None else value for value in (get(config, key), get(config, source)))
        if own != other:
            raise UserError(f"{key}={own} and {source}={other} must be equal: write {key}={other}, or {source}={own}")


def _check_networks(config: Config) -> None:
    """Check that widths, strides and bits are divisible."""
    model, prior = config.model, config.prior
    for part in ("model.encoder_", "model.decoder_", "prior."):
        width, heads = get(config, f"{part}width"), get(config, f"{part}heads")
        if width % heads:
            raise UserError(
                f"{part}width={width} does not divide into {part}heads={heads}: "
                f"write {part}heads={_divisor(width, heads)}"
            )
    if model.attention in ("fa3", "fa4") and model.dropout > 0:
        raise UserError(
            f"model.attention={model.attention} has no dropout, but model.dropout={model.dropout} is set: "
            "write model.dropout=0, or model.attention=fa2"
        )
    if model.attention in ("flash", "cudnn", "fa2", "fa3", "fa4") and config.train.precision == "fp32":
        raise UserError(
            f"model.attention={model.attention} has no kernel for train.precision=fp32: write train.precision=bf16, or "
            "model.attention=efficient"
        )
    size, levels = config.data.image_size, len(config.vae.multipliers)
    for name, stride in (("vae", config.vae.stride), ("tokenizer", config.tokenizer.stride)):
        if size % stride:
            raise UserError(
                f"data.image_size={size} is not a multiple of {name}'s stride {stride}: "
                f"write data.image_size={max(1, size // stride) * stride}"
            )
    if not all(-levels <= level < levels for level in config.vae.attention_levels):
        raise UserError(
            f"vae.attention_levels={config.vae.attention_levels} must be among the {levels} levels of vae.multipliers: "
            f"write values from 0, the finest, to {levels - 1}, or -1 for the deepest"
        )
    if prior.bits % prior.splits:
        raise UserError(
            f"tokenizer.bits={prior.bits} does not divide into prior.splits={prior.splits}: "
            f"write prior.splits={_divisor(prior.bits, prior.splits)}"
        )


def _check_tokens(config: Config) -> None:
    """Check that latents, discrete tokens and the model have the same grid."""
    model, prior = config.model, config.prior
    cells = config.latent_grid
    if config.task == "mixar" and cells != model.grid * model.patch:
        patch = _divisor(cells, model.patch)
        fix = f"model.patch={patch}" if patch != model.patch else f"model.grid={cells // patch}"
        raise UserError(
            f"the VAE gives {cells}x{cells} latent cells, but the model expects model.grid x model.patch "
            f"= {model.grid * model.patch}: write {fix}"
        )
    needs_codes = config.task == "prior" or (config.task == "mixar" and model.guidance != "none")
    if needs_codes and config.code_grid != model.grid:
        raise UserError(
            f"the tokenizer gives {config.code_grid}x{config.code_grid} discrete tokens, but model.grid "
            f"is {model.grid}, and both must be equal: write tokenizer.multipliers with "
            f"{int(math.log2(max(1, config.data.image_size // model.grid))) + 1} entries"
        )
    subtokens = prior.splits * model.grid**2
    if needs_codes and config.sample.prior_steps > subtokens:
        raise UserError(
            f"sample.prior_steps={config.sample.prior_steps} exceeds the {subtokens} sub-tokens of an image, where "
            f"MaskBit's loop masks everything again: write sample.prior_steps={subtokens} or less"
        )
    if config.ti_mix.enabled and model.guidance == "none":
        raise UserError(
            "ti_mix.enabled=true needs discrete tokens: write model.guidance=dc_mix, or ti_mix.enabled=false"
        )


def _check_losses(config: Config) -> None:
    """Check what the losses of the codec that is trained need."""
    if config.task not in ("vae", "tokenizer"):
        return
    losses: CodecLosses = getattr(config, config.task)
    if losses.perceptual_weight > 0 and losses.perceptual_features is None:
        raise UserError(
            f"{config.task}.perceptual_weight={losses.perceptual_weight} compares images in a classifier's features: "
            f"write {config.task}.perceptual_features=<a classifier's export, or the file of torch-fidelity's "
            f"InceptionV3>, or {config.task}.perceptual_weight=0"
        )
    if losses.discriminator_weight > 0 and config.data.image_size < JUDGED:
        raise UserError(
            f"{config.task}.discriminator_weight={losses.discriminator_weight} needs images of at least {JUDGED} "
            f"pixels, not data.image_size={config.data.image_size}: write {config.task}.discriminator_weight=0"
        )


# keys that are interpolations by default, and cannot have another value
_FOLLOWS = {
    "prior.bits": "tokenizer.bits",
    "prior.grid": "model.grid",
    "prior.classes": "data.classes",
    "model.latent_channels": "vae.latent_channels",
    "model.code_bits": "tokenizer.bits",
    "model.code_dim": "tokenizer.code_dim",
    "model.classes": "data.classes",
}


def get(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _divisor(width: int, near: int) -> int:
    """The divisor of `width` nearest to `near`."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - near))
