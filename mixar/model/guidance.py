"""The guidances, by which discrete tokens enter MixAR, one class each.

A new one is a class here, a line in `CLASSES`, and its name in the config.

A guidance owns no weights. `MixAR` holds its `parts` under their own names, which are those of the public weights, and
hands itself over where they are needed: engines that shard or compile a model see one flat module, as MAR's is.
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
    """DC-Mix (Eq. 9) with its linear map of the n bits.

    The operator is called here, and not by the model, because an engine that shards parameters has those of a module
    at hand in that module's forward only. The same goes for `CodeTable`.
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
    """DC-Mix (Eq. 9) with its linear map of the token's learned code; of a dropped token it is the bias alone."""

    codebook: Tensor  # [K, n], the tokenizer's own, which no training changes

    def __init__(self, codes: int, channels: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.zeros(codes, channels))
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(
        self, encoded: Tensor, slots: Tensor, codes: Tensor, positions: Tensor, mixture: Mixture | None
    ) -> Tensor:
        """The decoder's input [B, P, D]. Arguments as in `mix_gather`."""
        dropped = len(self.codebook)  # a code of zeros behind the others
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
        """Tokens [B, N] with their positions [N, D]: [B, N, D]. A dropped one (negative) has its position alone."""
        unseen = torch.full_like(codes, -1)
        return mix_gather(positions.new_empty(0, positions.shape[1]), unseen, codes, self.weight, None, positions)


class Guidance:
    """`none`, which is MAR itself: a learned vector at the masked positions of the decoder, and no discrete token.

    The base of the others: each overrides what it does differently.

    Attributes:
        first_values: how each parameter of `parts` starts, by its name in the model; see `initial_value`.
        prefix: discrete tokens that stand before the sequence, in the encoder as in the decoder.
        memory_tokens: tokens, of the encoder's width, that every block reads by cross-attention; 0 for no such layer.
    """

    first_values: ClassVar[dict[str, str]] = {"mask_token": "normal"}

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = cfg
        self.prefix = 0
        self.memory_tokens = 0

    def parts(self) -> dict[str, nn.Parameter | nn.Module]:
        """The parameters and modules that the model holds for it, by name."""
        return {"mask_token": nn.Parameter(torch.empty(1, 1, self.cfg.decoder_width))}

    def mix(
        self, codes: Tensor | None, masking: Masking, mixture: Mixture | None
    ) -> tuple[Tensor | None, Mixture | None]:
        """TI-Mix (Eq. 12): the tokens [B, N] that the guidance reads, and what is left for `decoder_input` to mix."""
        if mixture is not None:
            assert codes is not None
            codes = ti_mix(codes, mixture.drawn, masking.masked, mixture.rho, mixture.share)
        return codes, None

    def encoder_prefix(self, model: "MixAR", codes: Tensor | None) -> Tensor | None:
        """The `prefix` tokens [B, prefix, D] of the encoder, positions included; None where there are none."""
        return None

    def memory(self, model: "MixAR", codes: Tensor | None) -> Tensor | None:
        """The memory that cross-attention in encoder and decoder reads, [B, memory_tokens, D]; None without one."""
        return None

    def decoder_input(
        self, model: "MixAR", encoded: Tensor, slots: Tensor, codes: Tensor | None, mixture: Mixture | None
    ) -> Tensor:
        """The decoder's input [B, S + prefix + N, D], positions included.

        Args:
            encoded: [T, D], the encoder's packed output in the decoder's width.
            slots: as in `mix_gather`: the row of `encoded` that belongs to each position, negative where masked.
            codes, mixture: as `mix` gave them.
        """
        vector = model.get_parameter("mask_token")[0, 0]  # a bias without bits
        bitless = vector.new_empty(len(vector), 0)
        return mix_gather(encoded, slots, None, bitless, vector, self.decoder_positions(model))

    def decoder_positions(self, model: "MixAR") -> Tensor:
        """[S + prefix + N, D]."""
        return model.decoder_pos_embed_learned[0]


class DCMix(Guidance):
    """`dc_mix`: at the masked positions of the decoder a linear map of the token's ±1 bits, or learned code (Eq. 9)."""

    first_values: ClassVar[dict[str, str]] = {"code_proj.weight": "xavier", "code_proj.bias": "zero"}

    def parts(self) -> dict[str, nn.Parameter | nn.Module]:
        bits, channels, width = self.cfg.code_bits, self.cfg.code_dim, self.cfg.decoder_width
        learned = None if channels is None else CodebookProjection(2**bits, channels, width)
        return {"code_proj": learned or CodeProjection(bits, width)}

    def mix(
        self, codes: Tensor | None, masking: Masking, mixture: Mixture | None
    ) -> tuple[Tensor | None, Mixture | None]:
        return codes, mixture  # each token is read once: the operator mixes as it reads

    def decoder_input(
        self, model: "MixAR", encoded: Tensor, slots: Tensor, codes: Tensor | None, mixture: Mixture | None
    ) -> Tensor:
        assert codes is not None
        return model.get_submodule("code_proj")(encoded, slots, codes, self.decoder_positions(model), mixture)


class DCSA(Guidance):
    """`dc_sa`: all discrete tokens as a prefix, a learned table with positions of its own in encoder and decoder."""

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

    They are a learned table plus the encoder's positions, under a layer norm without parameters: without it the memory
    starts at a standard deviation of 0.03, and its attention flat.
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
    """The guidance that `model.guidance` names; it makes no tensor before `parts` is called."""
    return CLASSES[cfg.guidance](cfg)
