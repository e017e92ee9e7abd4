"""The files that a run reads in addition to its images and shards."""

import os

from mixar.config.checks import get
from mixar.config.knobs import Config
from mixar.errors import UserError


def check_inputs(config: Config, resumes: bool) -> None:
    """Refuse a run if one of its files is missing: those of frozen networks, `init_from`, `engine.deepspeed`.

    Their contents are checked when they are read; this check takes no time and no memory.

    Args:
        resumes: whether the run resumes from a checkpoint, and does not need initial weights.

    Raises:
        UserError: names all files that are missing.
    """
    keys = [key for key in needed_inputs(config) if not (resumes and key == "init_from")]
    if missing := missing_inputs(config, keys):
        raise UserError("; ".join(missing))


def needed_inputs(config: Config) -> list[str]:
    """The keys of files that training reads at its start, for previews or for its export."""
    needed = {
        "vae": ["vae.perceptual_features"] * (config.vae.perceptual_weight > 0),
        "tokenizer": ["tokenizer.perceptual_features"] * (config.tokenizer.perceptual_weight > 0),
        "prior": ["tokenizer.weights"],
        "mixar": ["vae.weights"] + ["tokenizer.weights", "prior.weights"] * (config.model.guidance != "none"),
    }
    return [*needed[config.task], "init_from", "engine.deepspeed"]


def missing_inputs(config: Config, keys: list[str]) -> list[str]:
    """A message for each of `keys` that names a missing file."""
    named = {key: get(config, key) for key in keys}
    return [
        f"{key}={path} is not there: write {key}=<its path>"
        for key, path in named.items()
        if path is not None and not os.path.exists(path)
    ]
