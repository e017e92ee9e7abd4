"""The guidances, the ways in which discrete tokens enter MixAR, one class each.

A new one needs a class here, a line in `CLASSES`, and its name in the config.

A guidance does not own weights. `MixAR` holds its `parts` under their own names, which are those of the public weights,
and passes itself to the methods that need them: engines that shard or compile a model see one flat module, like MAR's.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar.config import ModelConfig
from mixar.mixing import Masking, Mixture, ti_mix
from mixar.ops import mix_gather

if TYPE_CHECKING:
    from mixar.model.mixar import MixAR


class CodeProjection(nn.Module):
    """DC-Mix (Eq. 9) with a linear map of the n bits.

    The operator is called here, and not by the model, because an engine that shards parameters gathers those of a
    module only for that module's forward. The same holds for `CodeTable`.
    """

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, bits))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(
        self, encoded: Tensor, slots: Tensor, codes: Tensor, positions: Tensor, mixture: Mixture | None
    ) -> Tensor:
        """The decoder's input [B, P, D]. Arguments as in `mix_gather`."""
        return mix_gather(encoded, slots, codes, self.weight, self.bias, positions, *(mixture or ()))


class CodebookProjection(nn.Module):
    """DC-Mix (Eq. 9) with a linear map of the token's learned code; a dropped token gets the bias alone."""

    codebook: Tensor  # [K, n], the tokenizer's, frozen

    def __init__(self, codes: int, channels: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.zeros(codes, channels))
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(
        self, encoded: Tensor, slots: Tensor, codes: Tensor, positions: Tensor, mixture: Mixture | None
    ) -> Tensor:
        """The decoder's input [B, P, D]. Arguments as in `mix_gather`."""
        dropped = len(self.codebook)  # the index of a code of zeros after the others
        table = F.linear(F.pad(self.codebook, (0, 0, 0, 1)), self.weight, self.bias)
        codes = torch.where(codes < 0, dropped, codes)
        if mixture is not None:
            mixture = mixture._replace(drawn=torch.where(mixture.drawn < 0, dropped, mixture.drawn))
        return mix_gather(encoded, slots, codes, table, None, positions, *(mixture or ()))


class CodeTable(nn.Module):
    """The learned table of the discrete tokens (DC-SA, DC-CA)."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codes, width))

    def forward(self, codes: Tensor, positions: Tensor) -> Tensor:
        """Embeddings of codes [B, N] plus positions [N, D]: [B, N, D]; a dropped (negative) code has no embedding."""
        unseen = torch.full_like(codes, -1)
        return mix_gather(positions.new_empty(0, positions.shape[1]), unseen, codes, self.weight, None, positions)


class Guidance:
    """`none`, which is MAR itself: a learned vector at the masked positions of the decoder, and no discrete tokens.

    It is the base class of the others.

    Attributes:
        first_values: the rule of initialisation of each parameter of `parts`, by its name; see `initial_value`.
        prefix: number of discrete tokens before the sequence, in encoder and decoder.
        memory_tokens: number of tokens, of the encoder's width, that every block attends to by cross-attention; 0
            without cross-attention.
    """

    first_values: ClassVar[dict[str, str]] = {"mask_token": "normal"}

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = cfg
        self.prefix = 0
        self.memory_tokens = 0

    def parts(self) -> dict[str, nn.Parameter | nn.Module]:
        """The guidance's parameters and modules, by their names in the model."""
        return {"mask_token": nn.Parameter(torch.empty(1, 1, self.cfg.decoder_width))}

    def mix(
        self, codes: Tensor | None, masking: Masking, mixture: Mixture | None
    ) -> tuple[Tensor | None, Mixture | None]:
        """TI-Mix (Eq. 12): the tokens [B, N] to read, and the mixture that is left for `decoder_input` to apply."""
        if mixture is not None:
            assert codes is not None
            codes = ti_mix(codes, mixture.drawn, masking.masked, mixture.rho, mixture.share)
        return codes, None

    def encoder_prefix(self, model: "MixAR", codes: Tensor | None) -> Tensor | None:
        """The `prefix` tokens [B, prefix, D] of the encoder, positions included; None without a prefix."""
        return None

    def memory(self, model: "MixAR", codes: Tensor | None) -> Tensor | None:
        """The memory of the cross-attention in encoder and decoder, [B, memory_tokens, D]; None without one."""
        return None

    def decoder_input(
        self, model: "MixAR", encoded: Tensor, slots: Tensor, codes: Tensor | None, mixture: Mixture | None
    ) -> Tensor:
        """The decoder's input [B, S + prefix + N, D], positions included.

        Args:
            encoded: [T, D], the encoder's packed output, mapped to the decoder's width.
            slots: as in `mix_gather`: the row of `encoded` for each position, negative where masked.
            codes, mixture: as returned by `mix`.
        """
        vector = model.get_parameter("mask_token")[0, 0]  # as a bias with zero bits
        bitless = vector.new_empty(len(vector), 0)
        return mix_gather(encoded, slots, None, bitless, vector, self.decoder_positions(model))

    def decoder_positions(self, model: "MixAR") -> Tensor:
        """The decoder's position embeddings, [S + prefix + N, D]."""
        return model.decoder_pos_embed_learned[0]


class DCMix(Guidance):
    """`dc_mix`: a linear map of the token's ±1 bits or learned code at the decoder's masked positions (Eq. 9)."""

    first_values: ClassVar[dict[str, str]] = {"code_proj.weight": "xavier", "code_proj.bias": "zero"}

    def parts(self) -> dict[str, nn.Parameter | nn.Module]:
        bits, channels, width = self.cfg.code_bits, self.cfg.code_dim, self.cfg.decoder_width
        learned = None if channels is None else CodebookProjection(2**bits, channels, width)
        return {"code_proj": learned or CodeProjection(bits, width)}

    def mix(
        self, codes: Tensor | None, masking: Masking, mixture: Mixture | None
    ) -> tuple[Tensor | None, Mixture | None]:
        return codes, mixture  # the operator mixes while it reads the tokens

    def decoder_input(
        self, model: "MixAR", encoded: Tensor, slots: Tensor, codes: Tensor | None, mixture: Mixture | None
    ) -> Tensor:
        assert codes is not None
        return model.get_submodule("code_proj")(encoded, slots, codes, self.decoder_positions(model), mixture)


class DCSA(Guidance):
    """`dc_sa`: all discrete tokens as a prefix, embedded by a table, with own positions in encoder and decoder."""

    first_values: ClassVar[dict[str, str]] = Guidance.first_values | {
        "code_emb.weight": "normal",
        "encoder_code_pos_embed_learned": "normal",
        "decoder_code_pos_embed_learned": "normal",
    }

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.prefix = cfg.tokens

    def parts(self) -> dict[str, nn.Parameter | nn.Module]:
        n, enc, dec = self.cfg.tokens, self.cfg.encoder_width, self.cfg.decoder_width
        return super().parts() | {
            "code_emb": CodeTable(2**self.cfg.code_bits, enc),
            "encoder_code_pos_embed_learned": nn.Parameter(torch.empty(1, n, enc)),
            "decoder_code_pos_embed_learned": nn.Parameter(torch.empty(1, n, dec)),
        }

    def encoder_prefix(self, model: "MixAR", codes: Tensor | None) -> Tensor | None:
        assert codes is not None
        return model.get_submodule("code_emb")(codes, model.get_parameter("encoder_code_pos_embed_learned")[0])

    def decoder_positions(self, model: "MixAR") -> Tensor:
        classes, tokens = super().decoder_positions(model).tensor_split([self.cfg.class_tokens])
        return torch.cat([classes, model.get_parameter("decoder_code_pos_embed_learned")[0], tokens])


class DCCA(Guidance):
    """`dc_ca`: the discrete tokens as the memory of a cross-attention after every self-attention.

    They are embedded by a learned table, plus the encoder's positions, followed by a layer norm without parameters.
    Without the norm the memory starts with a standard deviation of 0.03, and the attention to it is nearly uniform.
    """

    first_values: ClassVar[dict[str, str]] = Guidance.first_values | {"code_emb.weight": "normal"}

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.memory_tokens = cfg.tokens

    def parts(self) -> dict[str, nn.Parameter | nn.Module]:
        return super().parts() | {"code_emb": CodeTable(2**self.cfg.code_bits, self.cfg.encoder_width)}

    def memory(self, model: "MixAR", codes: Tensor | None) -> Tensor | None:
        assert codes is not None
        positions = model.encoder_pos_embed_learned[0, self.cfg.class_tokens :]
        return F.layer_norm(model.get_submodule("code_emb")(codes, positions), (self.cfg.encoder_width,))


CLASSES: dict[str, type[Guidance]] = {"none": Guidance, "dc_mix": DCMix, "dc_sa": DCSA, "dc_ca": DCCA}


def guidance_of(cfg: ModelConfig) -> Guidance:
    """The guidance that `model.guidance` names; it creates tensors only in `parts`."""
    return CLASSES[cfg.guidance](cfg)
