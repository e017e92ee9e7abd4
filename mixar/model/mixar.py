"""MixAR: MAR's encoder, decoder and head, with the discrete tokens entering in one of four ways."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixar.config import STEPS, ModelConfig
from mixar.mixing import Masking, Mixture
from mixar.model.attention import Queries, Wanted, pack
from mixar.model.blocks import Block
from mixar.model.diffusion import Diffusion
from mixar.model.dropout import token_keys
from mixar.model.flow import Flow
from mixar.model.guidance import guidance_of
from mixar.model.head import Head
from mixar.model.process import Process


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Latents [B, c, H, W] to tokens [B, N, C] in raster order; within a token by channel, then row, then column."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`, for a square grid."""
    side = int(tokens.shape[1] ** 0.5)
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=side, p=patch, q=patch)


PROCESSES: dict[str, Callable[[str | None, int], Process]] = {"ddpm": Diffusion, "flow": Flow}


def process_of(kind: str, spec: str | None = None, last: int = STEPS - 1) -> Process:
    """The process that `model.process` names; arguments as in `Process`."""
    return PROCESSES[kind](spec, last)


class Losses(NamedTuple):
    """The loss of a batch, also per row, so that it can be analysed by time and mask ratio.

    A tuple, since sharding engines search a network's output for tensors, but not inside other classes.

    Attributes:
        loss: [], the mean over the masked rows of each image, then over images.
        rows: the sum of the process's terms, float32 [mul, R], detached.
        mse, vb: the terms, as `rows`; vb is None if the process does not learn its variance.
    """

    loss: Tensor
    rows: Tensor
    mse: Tensor
    vb: Tensor | None


class DiffusionHead(nn.Module):
    """The head under the name of the public weights, `diffloss.net.*`."""

    def __init__(self, cfg: ModelConfig, learn_variance: bool) -> None:
        super().__init__()
        self.net = Head(
            cfg.token_dim, cfg.decoder_width, cfg.head_depth, cfg.head_width, cfg.separable_adaln, learn_variance
        )


class MixAR(nn.Module):
    """Continuous masked autoregression p(x_c | x_d) (Eq. 6).

    State-dict names are those of the public MAR weights, which load unchanged into `guidance: none`. The ways in which
    discrete tokens enter are in `mixar.model.guidance`, the targets of the head in `mixar.model.process`.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.config = cfg
        n, s, enc, dec = cfg.tokens, cfg.class_tokens, cfg.encoder_width, cfg.decoder_width
        self.guidance = guidance_of(cfg)

        self.class_emb = nn.Embedding(cfg.classes, enc)
        self.fake_latent = nn.Parameter(torch.empty(1, enc))
        self.z_proj = nn.Linear(cfg.token_dim, enc)
        self.z_proj_ln = nn.LayerNorm(enc, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, s + n, enc))
        self.encoder_blocks = self._blocks(enc, cfg.encoder_heads, cfg.encoder_depth)
        self.encoder_norm = nn.LayerNorm(enc, eps=cfg.norm_eps)

        self.decoder_embed = nn.Linear(enc, dec)
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, s + n, dec))
        self.decoder_blocks = self._blocks(dec, cfg.decoder_heads, cfg.decoder_depth)
        self.decoder_norm = nn.LayerNorm(dec, eps=cfg.norm_eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, n, dec))

        for name, part in self.guidance.parts().items():
            setattr(self, name, part)

        self.process = process_of(cfg.process)
        self.diffloss = DiffusionHead(cfg, self.process.learns_variance)

    def _blocks(self, width: int, heads: int, depth: int) -> nn.ModuleList:
        cfg = self.config
        memory = cfg.encoder_width if self.guidance.memory_tokens else None
        return nn.ModuleList(
            Block(width, heads, cfg.mlp_ratio, cfg.dropout, cfg.norm_eps, memory, cfg.attention) for _ in range(depth)
        )

    def blocks(self) -> dict[str, list[nn.Module]]:
        """The modules that engines compile and shard one by one: the backbone's blocks, and the head as a whole."""
        return {"backbone": [*self.encoder_blocks, *self.decoder_blocks], "head": [self.diffloss.net]}

    def recomputed(self) -> dict[str, list[nn.Module]]:
        """The modules that engines recompute one by one."""
        return self.blocks() | {"head": [*self.diffloss.net.res_blocks]}

    @property
    def prefix(self) -> int:
        """Number of tokens before the continuous ones: the S class tokens, and the prefix of the guidance."""
        return self.config.class_tokens + self.guidance.prefix

    def class_embedding(self, labels: Tensor | None, drop: Tensor | None = None, batch: int = 1) -> Tensor:
        """Class embeddings [B, D]; the learned null embedding where `drop` [B] is set, or for all without labels."""
        if labels is None:
            return self.fake_latent.expand(batch, -1)
        embedding = self.class_emb(labels)
        return (
            embedding if drop is None else torch.where(drop[:, None], self.fake_latent.to(embedding.dtype), embedding)
        )

    def encode(
        self, tokens: Tensor, classes: Tensor, masking: Masking, codes: Tensor | None, keys: Tensor | None = None
    ) -> Tensor:
        """The encoder over class tokens, the guidance's prefix and the visible tokens.

        Args:
            tokens: [B, N, C]; values at masked positions are not used.
            classes: class embeddings [B, D].
            codes: int64 [B, N], negative where dropped; None under `guidance: none`.
            keys: int64 [B], one dropout key per image; None drops nothing.

        Returns:
            [T, D], packed as `masking.packed_rows(self.prefix)`.
        """
        s, positions = self.config.class_tokens, self.encoder_pos_embed_learned
        parts = [classes[:, None] + positions[:, :s], self.z_proj(tokens) + positions[:, s:]]
        if (prefix := self.guidance.encoder_prefix(self, codes)) is not None:
            parts.insert(1, prefix)
        x = torch.cat(parts, 1)
        rows, counts = masking.packed_rows(self.prefix), [self.prefix + v for v in masking.visible]
        memory = self.guidance.memory(self, codes)
        width, used = x.shape[1], len(rows)
        if masking.room is not None:  # further images of copies of one token
            spare, more = masking.room.visible - sum(masking.visible), -(-masking.room.visible // width)
            rows = F.pad(rows, (0, spare))
            counts += [spare * (i + 1) // more - spare * i // more for i in range(more)]
        lengths = pack(counts, self.config.attention, x.device, width)
        x = self.z_proj_ln(x.flatten(0, 1)[rows])
        for layer, block in enumerate(self.encoder_blocks):
            x = block(x, lengths, memory, None if keys is None else token_keys(keys, width, layer).flatten()[rows])
        return self.encoder_norm(x[:used])

    def decode(
        self, encoded: Tensor, masking: Masking, codes: Tensor | None, wanted: Wanted, keys: Tensor | None = None,
        mixture: Mixture | None = None,
    ) -> Tensor:  # fmt: skip
        """The decoder over all positions, up to its final norm's input: [R, D]. Arguments as in `encode`.

        Args:
            wanted: the rows of the flattened [B*N] positions to return; the last block computes only these.
            mixture: the mixture that `Guidance.mix` left for the decoder's input.
        """
        b, n = masking.masked.shape
        embedded, slots = self.decoder_embed(encoded), masking.slots(self.prefix)
        x = self.guidance.decoder_input(self, embedded, slots, codes, mixture)
        width, attention = self.prefix + n, self.config.attention
        lengths = pack((width,) * b, attention, x.device, width)
        memory = self.guidance.memory(self, codes)
        x = x.flatten(0, 1)
        rows, counts = wanted.rows + self.prefix * (wanted.rows // n + 1), list(wanted.counts)
        if masking.room is not None:  # the last image has copies of one query
            spare = masking.room.masked - len(rows)
            rows = F.pad(rows, (0, spare), value=b * width - 1)
            counts[-1] += spare
        longest = n if masking.room is None else len(rows)
        queries = Queries(rows, pack(counts, attention, x.device, longest))
        for layer, block in enumerate(self.decoder_blocks, len(self.encoder_blocks)):
            token = None if keys is None else token_keys(keys, width, layer).flatten()
            x = block(x, lengths, memory, token, queries if block is self.decoder_blocks[-1] else None)
        return x[: len(wanted.rows)]

    def condition(
        self, tokens: Tensor, classes: Tensor, masking: Masking, codes: Tensor | None, wanted: Wanted,
        keys: Tensor | None = None, mixture: Mixture | None = None,
    ) -> Tensor:  # fmt: skip
        """z [R, D], the head's condition at the `wanted` of the [B*N] positions. Arguments as in `forward`."""
        codes, mixture = self.guidance.mix(codes, masking, mixture)
        x = self.decode(self.encode(tokens, classes, masking, codes, keys), masking, codes, wanted, keys, mixture)
        return self.decoder_norm(x) + self.diffusion_pos_embed_learned[0, wanted.rows % self.config.tokens]

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        masking: Masking,
        codes: Tensor | None,
        t: Tensor,
        noise: Tensor,
        drop: Tensor | None = None,
        keys: Tensor | None = None,
        mixture: Mixture | None = None,
    ) -> Losses:
        """The process's loss (Eq. 5) on the masked rows, each at `mul` noise levels.

        Args:
            tokens: x_c [B, N, C], normalised.
            labels: int64 [B].
            codes: int64 [B, N], negative where dropped; None under `guidance: none`.
            t: [mul, R] for the R masked rows, as the process's `times` gives them.
            noise: ε [mul, R, C].
            drop: bool [B], True where the class is dropped.
            keys: as in `encode`; required for training with dropout.
            mixture: replacements of some `codes` by TI-Mix (Eq. 12).
        """
        if not self.training or self.config.dropout == 0:
            keys = None
        elif tokens.is_cuda:
            keys = None  # torch's generator, which the trainer seeds by the micro-batch, costs a tenth of the keys
        else:
            assert keys is not None, "training with dropout needs one key per image"
        rows = masking.masked_rows
        wanted = Wanted(rows, masking.hidden)
        z = self.condition(tokens, self.class_embedding(labels, drop), masking, codes, wanted, keys, mixture)
        target = tokens.flatten(0, 1)[rows]
        mul = len(t)
        spare = 0 if masking.room is None else masking.room.masked - len(rows)

        def net(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            if spare == 0:
                return self.diffloss.net(x, t, z)
            x, t = F.pad(x.view(mul, len(rows), -1), (0, 0, 0, spare)), F.pad(t.view(mul, -1), (0, spare))
            outs = self.diffloss.net(x.flatten(0, 1), t.flatten(), F.pad(z, (0, 0, 0, spare)))
            cut = lambda y: y.unflatten(0, (mul, -1))[:, : len(rows)].flatten(0, 1)
            return cut(outs[0]), None if outs[1] is None else cut(outs[1])

        mse, vb = self.process.losses(net, target.repeat(mul, 1), t.flatten(), noise.flatten(0, 1))
        each = (mse if vb is None else mse + vb).view(mul, -1)
        loss = (each.mean(0) * masking.row_weights).sum()
        return Losses(
            loss, each.detach(), mse.detach().view(mul, -1), None if vb is None else vb.detach().view(mul, -1)
        )
