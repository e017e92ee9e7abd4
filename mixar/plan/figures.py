"""A plan as plain values, from the config and the model on the meta device: nothing is allocated or started."""

from typing import Any

import torch
from torch import nn

from mixar.cards import CARDS
from mixar.codecs import VAE, build_tokenizer, for_training
from mixar.config import Config, images_per_pass
from mixar.data.manifest import read_manifest
from mixar.errors import UserError
from mixar.model import MixAR
from mixar.plan.engines import Layout, Sizes, engine_plans, images_a_rank
from mixar.plan.text import assumptions
from mixar.plan.work import mean_tokens, prior_flops, prior_share, training_flops
from mixar.prior import Prior, load_prior
from mixar.weights import is_export

_COPIES = {"weights": 1, "gradients": 1, "adam": 2, "ema": 1}  # float32 values per parameter


def parameter_count(cfg: Config) -> int:
    """The number of trained parameters of the run, counted on the meta device."""
    return _values(_build(cfg, cfg.task))


def make_plan(cfg: Config, images: int | None = None, gpus: int | None = None, card: str = "h100") -> dict[str, Any]:
    """The plan of a run.

    Args:
        images: number of training images; by default that of the shards' manifest, else `data.count`.
        gpus: also plan the run on this number of GPUs, with every engine.
        card: one of `CARDS`.

    Returns:
        plain values. `memory` is in bytes for one process, without activations; `discriminator` are those of the
        parameters that only a codec's training has; `flops` are per training image, of task=mixar. With
        `gpus` also the layout, `engines` (bytes per rank, bytes sent per rank and step, seconds, images/s and days),
        and their `assumptions`.

    Raises:
        UserError: the batch does not divide over the GPUs, or there are GPUs for a task other than mixar.
    """
    model = _build(cfg, cfg.task)
    parameters = _values(model)
    images = images or _images(cfg)
    steps = None if images is None else -int(-cfg.train.epochs * images // cfg.train.batch)
    plan: dict[str, Any] = {
        "task": cfg.task,
        "parameters": parameters,
        "images": images,
        "epochs": cfg.train.epochs,
        "batch": cfg.train.batch,
        "steps": steps,
        "memory": {name: 4 * copies * parameters for name, copies in _COPIES.items()},
    }
    plan["memory"]["total"] = sum(plan["memory"].values())
    if hasattr(model, "discriminator"):
        plan["discriminator"] = _values(model.get_submodule("discriminator"))
    if not isinstance(model, MixAR):
        if gpus is not None:
            raise UserError(f"--gpus plans task=mixar only, but this config has task={cfg.task}: leave --gpus out")
        return plan

    tokens = mean_tokens(cfg, images_per_pass(cfg, ranks=1) if gpus is None else images_a_rank(cfg, gpus))
    plan["guidance"] = cfg.model.guidance
    plan |= {"encoder_tokens": round(tokens.encoder, 1), "decoder_tokens": tokens.decoder}
    plan["flops"] = training_flops(model, tokens)
    executed, frozen = sum(training_flops(model, tokens, cfg.engine.recompute).values()), 0
    prior = _prior_of_a_step(cfg)
    if prior is not None:
        plan["flops"]["prior"] = prior_share(cfg) * prior_flops(prior)
        executed, frozen = executed + plan["flops"]["prior"], _values(prior)
    plan["flops"]["total"] = sum(plan["flops"].values())
    if gpus is not None:
        layout = Layout(cfg, gpus, Sizes.of(model), tokens, frozen)
        plan |= {"card": card, "gpus": gpus, "nodes": layout.nodes, "micro_batch": layout.micro}
        plan["passes"] = layout.passes
        plan["chosen"] = {launcher: layout.engine(launcher) for launcher in ("torchrun", "deepspeed")}
        plan["engines"] = engine_plans(layout, CARDS[card], executed, steps)
        plan["assumptions"] = assumptions(card, cfg)
    return plan


def memory_fixes(cfg: Config, ranks: int, engine: str, memory: float) -> list[str]:
    """Overrides of the config with which a run would need less memory than it does, and at most `memory` bytes a rank.

    They are alternatives: a smaller micro-batch, recomputation, another engine. There are none for tasks other than
    mixar, which are not planned.
    """
    model = _build(cfg, cfg.task)
    if not isinstance(model, MixAR):
        return []
    prior, tokens = _prior_of_a_step(cfg), mean_tokens(cfg, images_per_pass(cfg, ranks))
    layout = Layout(cfg, ranks, Sizes.of(model), tokens, 0 if prior is None else _values(prior))
    return layout.fixes(engine, memory) + layout.others(engine, memory)[:1]


def _prior_of_a_step(cfg: Config) -> Prior | None:
    """The prior, where a training step runs it."""
    if not (cfg.ti_mix.enabled and cfg.ti_mix.source == "online"):
        return None
    weights = cfg.prior.weights
    # an export has its own geometry
    exported = weights is not None and is_export(weights)
    prior = load_prior(cfg.prior, cfg.trust_pickle) if exported else _build(cfg, "prior")
    assert isinstance(prior, Prior)
    return prior


def _build(cfg: Config, task: str) -> nn.Module:
    with torch.device("meta"):
        return {
            "mixar": lambda: MixAR(cfg.model), "prior": lambda: Prior(cfg.prior),
            "vae": lambda: for_training(VAE(cfg.vae), cfg.vae),
            "tokenizer": lambda: for_training(build_tokenizer(cfg.tokenizer), cfg.tokenizer),
        }[task]()  # fmt: skip


def _values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _images(cfg: Config) -> int | None:
    try:
        return read_manifest(cfg.data.shards, cfg.data.cache).count
    except UserError:
        return cfg.data.count  # no shards yet
