"""The discrete prior g_M: MaskBit's generator, its training loss, and the sampling of codes."""

from pathlib import Path

from mixar.config import PriorConfig, section_from_dict
from mixar.errors import UserError
from mixar.prior.lfqbert import Prior
from mixar.prior.loss import masked_loss, training_mask
from mixar.prior.sampling import fill, keyed_draws, sample_codes
from mixar.prior.tokens import combine_ids, split_ids
from mixar.weights import find_export, loaded, read_export, read_public

__all__ = [
    "Prior",
    "combine_ids",
    "fill",
    "keyed_draws",
    "load_prior",
    "masked_loss",
    "sample_codes",
    "split_ids",
    "training_mask",
]


def load_prior(cfg: PriorConfig, trust_pickle: bool = False) -> Prior:
    """The frozen prior at `cfg.weights`, in eval mode on the CPU.

    An export folder contains its own geometry; a public checkpoint must fit that of `cfg`.

    Raises:
        UserError: there are no weights, or they are of another kind or of another geometry.
    """
    path = cfg.weights
    if path is None:
        raise UserError(
            "the discrete prior has no weights: write prior.weights=<folder of an exported prior> "
            "or prior.weights=<path of MaskBit's maskbit_generator_14bit.bin>"
        )
    if Path(path).is_dir():
        path = str(find_export(path))
        saved, state = read_export(path, "prior")
        cfg = section_from_dict(PriorConfig, saved["config"], path)
    else:
        state = read_public(path, "generator", trust_pickle)
    return loaded(lambda: Prior(cfg), state, path).eval().requires_grad_(False)
