"""Initial weights as a function of (seed, parameter name, full shape), so that no layout of ranks changes them."""

import zlib
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mixar.model.guidance import CLASSES

# MAR's initialisation by name; the first matching pattern counts, and a name without a match is an error
RULES = {
    "diffloss.net.*adaLN_modulation.*": "zero",  # so that the head's output starts at zero
    "diffloss.net.final_layer.linear.*": "zero",
    "diffloss.net.time_embed.mlp.*.weight": "normal",
    "fake_latent": "normal",
    "class_emb.weight": "normal",
    "encoder_pos_embed_learned": "normal",
    "decoder_pos_embed_learned": "normal",
    "diffusion_pos_embed_learned": "normal",
    **{name: rule for guidance in CLASSES.values() for name, rule in guidance.first_values.items()},
    "*norm.weight": "one",
    "*.norm[12].weight": "one",
    "*_ln.weight": "one",
    "*norm.bias": "zero",
    **{f"{module}.weight": "xavier" for module in ("z_proj", "decoder_embed", "*coder_blocks.*", "diffloss.net.*")},
    **{f"{module}.bias": "zero" for module in ("z_proj*", "decoder_embed", "*coder_blocks.*", "diffloss.net.*")},
}


def initial_value(name: str, like: Tensor, seed: int) -> Tensor:
    """The initial value of the parameter `name`, by `RULES`: float32 on the CPU, of `like`'s shape.

    Raises:
        KeyError: there is no rule for that name.
    """
    rule = next((rule for pattern, rule in RULES.items() if fnmatchcase(name, pattern)), None)
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    value = torch.zeros(like.shape)
    match rule:
        case "zero":
            return value
        case "one":
            return value.fill_(1.0)
        case "normal":
            return value.normal_(0, 0.02, generator=generator)
        case "xavier":
            return nn.init.xavier_uniform_(value, generator=generator)
    raise KeyError(f"{name} starts with no known value: name one in its guidance's first_values, or in model/init.py")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` with its `initial_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter, seed))
