"""Refuse what cannot work, naming the key and what to write instead."""

import math
from typing import Any

from mixar.config.knobs import (
    ATTENTIONS,
    ENGINES,
    GUIDANCES,
    ORDERS,
    PRECISIONS,
    RECOMPUTE,
    SOLVERS,
    TASKS,
    Config,
    SampleConfig,
)
from mixar.errors import UserError


def validate(config: Config) -> None:
    """Refuse what cannot work, naming the key and what to write instead.

    Raises:
        UserError: at the first impossible value or combination.
    """
    _check_values(config)
    _check_networks(config)
    _check_tokens(config)
    images_a_pass(config, ranks=1)
    check_sample(config.sample)


def check_sample(sample: SampleConfig) -> None:
    """Sampling settings that go together.

    Raises:
        UserError: those that do not.
    """
    interval = sample.guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(
            f"sample.guidance_interval={interval} must be two shares of the steps, from 0 to 1 and "
            "ascending, as in sample.guidance_interval=[0.25,1]"
        )
    steps, end = sample.diffusion_steps, sample.diffusion_steps_end
    if end is not None and not (steps.isdecimal() and int(steps) >= end):
        raise UserError(
            f"sample.diffusion_steps_end={end} is what a count of diffusion steps falls to, not "
            f"sample.diffusion_steps={steps}: write sample.diffusion_steps={max(50, end)}"
        )
    if sample.solver == "dpm" and (steps == "1" or end == 1):
        raise UserError("sample.solver=dpm needs at least 2 diffusion steps: write sample.diffusion_steps=2 or more")
    if sample.solver == "dpm" and sample.temperature != 1:
        raise UserError(
            f"sample.temperature={sample.temperature} scales noise, of which sample.solver=dpm adds none: write "
            "sample.temperature=1, or sample.solver=ddpm"
        )


def _check_values(config: Config) -> None:
    """Each value by itself, and against the one that it follows by default."""
    for key, choices in _CHOICES.items():
        value = get(config, key)
        if value not in choices:
            raise UserError(f"{key}={value} is not known: write one of {', '.join(filter(None, choices))}")
    for key, low, high in _RANGES:
        value = get(config, key)
        if value is not None and not low <= value <= high:
            limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise UserError(f"{key}={value} is out of range: write a value {limits}")
    for key in ("vae.multipliers", "tokenizer.multipliers"):
        value = get(config, key)
        if not value or min(value) < 1:
            raise UserError(f"{key}={value} must hold a factor of the width for each level, as in {key}=[1,2,4]")
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optim.betas={betas} must be two values from 0 to below 1, as in optim.betas=[0.9,0.95]")
    for key, source in _FOLLOWS.items():
        if get(config, key) != get(config, source):
            raise UserError(
                f"{key}={get(config, key)} contradicts {source}={get(config, source)}: "
                f"write {source}={get(config, key)} and leave {key} out"
            )


def _check_networks(config: Config) -> None:
    """Widths, heads, strides and bits that divide."""
    model, prior = config.model, config.prior
    for name, width, heads in (
        ("model.encoder", model.encoder_width, model.encoder_heads),
        ("model.decoder", model.decoder_width, model.decoder_heads),
        ("prior.", prior.width, prior.heads),
    ):
        if width % heads:
            raise UserError(
                f"{name.rstrip('.')} width {width} does not divide into {heads} heads: "
                f"write {name}{'' if name.endswith('.') else '_'}heads={_divisor(width, heads)}"
            )
    if model.attention in ("fa3", "fa4") and model.dropout > 0:
        raise UserError(
            f"model.attention={model.attention} has no dropout, model.dropout={model.dropout} asks for it: "
            "write model.dropout=0, or model.attention=fa2"
        )
    if model.attention in ("flash", "cudnn", "fa2", "fa3", "fa4") and config.train.precision == "fp32":
        raise UserError(
            f"model.attention={model.attention} has no kernel for train.precision=fp32: write train.precision=bf16, or "
            "model.attention=efficient"
        )
    for name, codec in (("vae", config.vae), ("tokenizer", config.tokenizer)):
        stride = 2 ** (len(codec.multipliers) - 1)
        if codec.image_size % stride:
            raise UserError(
                f"data.image_size={codec.image_size} is no multiple of {name}'s stride {stride}: "
                f"write data.image_size={max(1, codec.image_size // stride) * stride}"
            )
    if prior.bits % prior.splits:
        raise UserError(
            f"tokenizer.bits={prior.bits} does not divide into prior.splits={prior.splits}: "
            f"write prior.splits={_divisor(prior.bits, prior.splits)}"
        )


def _check_tokens(config: Config) -> None:
    """Latents, discrete tokens and the model's positions on one grid."""
    model, prior = config.model, config.prior
    cells = config.vae.grid
    if config.task == "mixar" and cells != model.grid * model.patch:
        patch = _divisor(cells, model.patch)
        mend = f"model.patch={patch}" if patch != model.patch else f"model.grid={cells // patch}"
        raise UserError(
            f"the VAE gives {cells}x{cells} latent cells, the model expects model.grid x model.patch "
            f"= {model.grid * model.patch}: write {mend}"
        )
    needs_codes = config.task == "prior" or (config.task == "mixar" and model.guidance != "none")
    if needs_codes and config.tokenizer.grid != model.grid:
        raise UserError(
            f"the tokenizer gives {config.tokenizer.grid}x{config.tokenizer.grid} discrete tokens, model.grid is "
            f"{model.grid}: a tokenizer and a model of one grid are needed; write tokenizer.multipliers with "
            f"{int(math.log2(max(1, config.tokenizer.image_size // model.grid))) + 1} entries"
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


def images_a_pass(config: Config, ranks: int) -> int:
    """The micro-batch of a run on so many ranks: `train.micro_batch`, else each rank's whole share of the batch.

    Raises:
        UserError: a batch that does not divide over the ranks, a share into passes, or a pass into groups of masks.
    """
    batch, mask = config.train.batch, config.mask
    if batch % ranks:
        fitting = math.ceil(batch / ranks) * ranks
        raise UserError(f"train.batch={batch} does not divide over {ranks} ranks: write train.batch={fitting}")
    share = batch // ranks
    micro = config.train.micro_batch or share
    if share % micro:
        whole = f"train.batch={batch}" if ranks == 1 else f"the {share} images of each of {ranks} ranks"
        fitting = math.ceil(share / micro) * micro * ranks
        raise UserError(
            f"train.micro_batch={micro} does not divide {whole}: write train.batch={fitting}, or "
            f"train.micro_batch={math.gcd(micro, share)}"
        )
    if config.task == "mixar" and mask.ratio_scope == "image" and micro % mask.group:
        among = "" if ranks == 1 else f" on {ranks} ranks"
        raise UserError(
            f"mask.group={mask.group} does not divide the micro-batch {micro}{among}: "
            f"write mask.group={math.gcd(mask.group, micro)}"
        )
    return micro


_CHOICES = {
    "task": TASKS,
    "model.guidance": GUIDANCES,
    "model.attention": ATTENTIONS,
    "mask.ratio_scope": ("image", "batch"),
    "ti_mix.source": ("online", "shards"),
    "ti_mix.draw": ("sample", "argmax"),
    "ti_mix.schedule": ("linear", "cosine", "constant"),
    "optim.implementation": ("torch", "apex"),
    "optim.schedule": ("constant", "cosine", "linear"),
    "train.precision": PRECISIONS,
    "engine.name": (None, *ENGINES),
    "engine.recompute": RECOMPUTE,
    "sample.order": ORDERS,
    "sample.solver": SOLVERS,
    "sample.guidance_schedule": ("linear", "constant"),
    "sample.prior_guidance_schedule": ("none", "linear", "cosine"),
    "sample.prior_mask_schedule": ("arccos", "cosine"),
}
# what is an interpolation by default, and cannot be another value
_FOLLOWS = {
    "vae.image_size": "data.image_size",
    "tokenizer.image_size": "data.image_size",
    "prior.bits": "tokenizer.bits",
    "prior.grid": "model.grid",
    "prior.classes": "data.classes",
    "model.latent_channels": "vae.latent_channels",
    "model.code_bits": "tokenizer.bits",
    "model.classes": "data.classes",
}
_INF = math.inf
_RANGES = [
    *((f"{name}.{size}", 1, _INF) for name in ("vae", "tokenizer") for size in ("width", "blocks")),
    *((f"prior.{size}", 1, _INF) for size in ("width", "depth", "heads", "mlp_width", "splits")),
    *((f"model.{part}_{size}", 1, _INF) for part in ("encoder", "decoder") for size in ("width", "depth", "heads")),
    ("vae.latent_channels", 1, _INF),
    ("model.head_depth", 1, _INF),
    ("model.head_width", 1, _INF),
    ("data.count", 1, _INF),
    ("data.image_size", 1, _INF),
    ("data.classes", 1, _INF),
    ("data.workers", 0, _INF),
    ("data.max_broken", 0, 0.99),
    ("data.held_out", 0, _INF),
    ("tokenizer.bits", 1, 24),
    ("model.grid", 1, _INF),
    ("model.patch", 1, _INF),
    ("model.class_tokens", 1, _INF),
    ("model.dropout", 0, 0.99),
    ("prior.dropout", 0, 0.99),
    ("prior.class_drop_prob", 0, 1),
    ("model.class_drop_prob", 0, 1),
    ("model.guidance_drop_prob", 0, 1),
    ("model.diffusion_batch_mul", 1, _INF),
    ("mask.minimum", 0, 1),
    ("mask.std", 1e-6, _INF),
    ("mask.group", 1, _INF),
    ("ti_mix.end", 0, 1),
    ("ti_mix.start_epoch", 0, _INF),
    ("ti_mix.duration_epochs", 0, _INF),
    ("ti_mix.variants", 1, _INF),
    ("optim.lr", 0, _INF),
    ("optim.clip", 0, _INF),
    ("optim.ema", 0, 1),
    ("optim.warmup_epochs", 0, _INF),
    ("train.epochs", 0, _INF),
    ("train.batch", 1, _INF),
    ("train.micro_batch", 1, _INF),
    ("train.log_every", 1, _INF),
    ("train.keep", 1, _INF),
    ("train.max_skips", 0, _INF),
    ("engine.timeout", 1, _INF),
    ("sample.steps", 1, _INF),
    ("sample.diffusion_steps_end", 1, 1000),
    ("sample.diffusion_start", 0, 999),
    ("sample.prior_steps", 1, _INF),
    ("sample.prior_guidance", 0, _INF),
    ("sample.prior_temperature", 1e-6, _INF),
    ("sample.temperature", 0, _INF),
    ("sample.batch", 1, _INF),
]


def get(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _divisor(width: int, near: int) -> int:
    """The divisor of `width` nearest to `near`."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - near))
