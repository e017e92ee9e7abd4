"""Initial weights as a function of (seed, parameter name, full shape), so that no layout of ranks changes them."""

import zlib

import torch
from torch import Tensor, nn


def initial_value(name: str, like: Tensor, seed: int) -> Tensor:
    """MAR's initialisation of the parameter `name`: float32 on the CPU, of `like`'s shape.

    Embeddings, learned vectors and position tables normal 0.02; the head's adaptive norms and last layer zero, so that
    its output starts at zero; its time MLP normal 0.02; every other matrix Xavier-uniform; biases zero, norms one.
    """
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    value = torch.zeros(like.shape)
    if name.startswith("diffloss.") and ("adaLN_modulation" in name or "final_layer.linear" in name):
        return value
    if name.rpartition(".")[2] in _LEARNED or name in _TABLES or ("time_embed.mlp" in name and like.ndim == 2):
        return value.normal_(0, 0.02, generator=generator)
    if like.ndim == 2:
        return nn.init.xavier_uniform_(value, generator=generator)
    return value if name.endswith("bias") else value.fill_(1.0)


_LEARNED = (
    "fake_latent",
    "mask_token",
    "encoder_pos_embed_learned",
    "decoder_pos_embed_learned",
    "diffusion_pos_embed_learned",
    "encoder_code_pos_embed_learned",
    "decoder_code_pos_embed_learned",
)
_TABLES = ("class_emb.weight", "code_emb.weight")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` by `initial_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter, seed))
