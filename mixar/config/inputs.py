"""The files that a run reads beside its images and shards."""

import os

from mixar.config.checks import get
from mixar.config.knobs import Config
from mixar.errors import UserError


def check_inputs(config: Config, resumes: bool) -> None:
    """Refuse a run that would miss one of its files: the frozen networks, `init_from`, `engine.deepspeed`.

    Their contents are checked by those that read them; this takes no time and no memory.

    Args:
        resumes: it goes on from a checkpoint, and needs no first weights.

    Raises:
        UserError: all that are named and not there.
    """
    keys = [key for key in needed_inputs(config) if not (resumes and key == "init_from")]
    if missing := missing_inputs(config, keys):
        raise UserError("; ".join(missing))


def needed_inputs(config: Config) -> list[str]:
    """The keys that name files which training by `config` reads, at its start, for previews or for its export."""
    codecs = {
        "vae": [],
        "tokenizer": [],
        "prior": ["tokenizer.weights"],
        "mixar": ["vae.weights"] + ["tokenizer.weights", "prior.weights"] * (config.model.guidance != "none"),
    }
    return [*codecs[config.task], "init_from", "engine.deepspeed"]


def missing_inputs(config: Config, keys: list[str]) -> list[str]:
    """A sentence for each of `keys` that names what is not there."""
    named = {key: get(config, key) for key in keys}
    return [
        f"{key}={path} is not there: write {key}=<its path>"
        for key, path in named.items()
        if path is not None and not os.path.exists(path)
    ]
