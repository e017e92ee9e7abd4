"""The training of MixAR: mask, TI-Mix, the head's loss. It is the paper's training step on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mixar import rng
from mixar.codecs import LatentNorm, posterior
from mixar.config import STEPS, Config, to_dict
from mixar.data.batch import Batch
from mixar.engine import Scalars
from mixar.log import log
from mixar.mixing import Masking, Mixture, Room, ground_truth_share, masked_counts, rooms
from mixar.model import MixAR, initial_value, patchify, process_of
from mixar.objectives.base import mean_of, means_by_bucket
from mixar.objectives.frozen import Frozen
from mixar.prior import Prior, fill
from mixar.rng import Stream
from mixar.sampling import MixARPipeline
from mixar.transfer import to_device
from mixar.weights import write_export

T_BUCKETS = [f"loss/t{low:03d}-{low + 249:03d}" for low in range(0, STEPS, 250)]
RATIO_BUCKETS = [f"loss/mask{low}-{low + 10}%" for low in range(0, 100, 10)]


class MixARObjective:
    """The head's loss with any guidance, with TI-Mix online or from pre-drawn tokens.

    Args:
        norm: the latents' normalisation, from the shards' manifest or MAR's scale.
        device: the device of the frozen prior, which is not part of the trained model.
        made: the fingerprints of the codecs that made the shards, as in `Frozen`.
    """

    def __init__(self, cfg: Config, norm: LatentNorm, device: torch.device, made: dict[str, Any] | None = None) -> None:
        self.cfg = cfg
        self.norm = norm.to(device)
        self.padded = device.type == "cuda" and cfg.engine.compiles(gpu=True)
        self.process = process_of(cfg.model.process)
        self.frozen = Frozen(cfg, made or {})
        online = cfg.ti_mix.enabled and cfg.ti_mix.source == "online"
        self.prior: Prior | None = self.frozen.prior.to(device) if online else None

    def build(self) -> nn.Module:
        return MixAR(self.cfg.model)

    def bare(self) -> nn.Module:
        return self.build()

    def load_frozen(self) -> dict[str, str]:
        return {} if self.prior is None else {"prior": self.frozen.fingerprints["prior"]}  # loaded at the beginning

    def initial(self, name: str, like: Tensor) -> Tensor:
        if name == "code_proj.codebook":
            return self.frozen.tokenizer.codebook()
        return initial_value(name, like, self.cfg.seed)

    def decays(self, name: str, parameter: Tensor) -> bool:
        # MAR's rule: no decay of vectors, nor of anything in the diffusion head
        return parameter.ndim > 1 and not name.startswith("diffloss.")

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> tuple[Tensor, Scalars]:
        cfg, seed = self.cfg.model, self.cfg.seed
        batch, masking = self._mask(batch)
        n, c, mul = cfg.tokens, cfg.token_dim, cfg.diffusion_batch_mul
        codes, mixture, share, generated = self._codes(batch, masking, epoch)
        drop = rng.uniform(seed, Stream.CLASS_DROP, batch.index, 1)[:, 0] < cfg.class_drop_prob
        rows = masking.masked_rows
        t = self.process.times(rng.uniform(seed, Stream.TIMESTEP, batch.index, mul, n))
        t = rearrange(t, "b mul n -> mul (b n)")[:, rows]
        noise = rng.normal(seed, Stream.NOISE, batch.index, mul, n, c)
        noise = rearrange(noise, "b mul n c -> mul (b n) c")[:, rows]

        on_host = batch.index.device.type == "cpu"
        keys = rng.bits(seed, Stream.DROPOUT, batch.index, 1)[:, 0] if on_host else None

        losses = model(self._tokens(batch), batch.labels, masking, codes, t, noise, drop, keys, mixture)

        each = losses.rows
        ratio = masking.masked.float().mean(-1)[rows // n].expand_as(each)
        scalars = {"loss": mean_of(losses.loss), "loss/mse": mean_of(losses.mse)}
        if losses.vb is not None:
            scalars["loss/vb"] = mean_of(losses.vb)
        scalars |= means_by_bucket(each.flatten(), t.flatten().long() // 250, T_BUCKETS)
        # a ratio of 1 belongs to the last bucket; the 1e-6 keeps 0.9 from being rounded below its own edge
        scalars |= means_by_bucket(each.flatten(), (ratio.flatten() * 10 + 1e-6).long().clamp_max(9), RATIO_BUCKETS)
        if codes is not None:
            now = torch.full((), share, device=rows.device)
            scalars |= {"ti_mix/lambda": mean_of(now), "ti_mix/generated": generated}
        return losses.loss, scalars

    def _mask(self, batch: Batch) -> tuple[Batch, Masking]:
        """Mask the batch (Eq. 8), with its images sorted by masked positions, so that equal lengths are adjacent."""
        cfg = self.cfg
        if batch.drawn is not None:
            counts = batch.drawn.count
        else:
            counts = masked_counts(cfg.mask, cfg.model.tokens, cfg.seed, batch.host_index, cfg.train.batch)
        batch = batch.select(sorted(range(len(counts)), key=counts.__getitem__))
        if batch.drawn is not None:
            order = batch.drawn.order
        else:
            order = rng.permutation(cfg.seed, Stream.MASK_ORDER, batch.index, cfg.model.tokens)
        known: Sequence[Room] = ()
        if self.padded and (batch.drawn is not None or cfg.mask.ratio_scope == "batch"):
            known = rooms(cfg.mask, cfg.model.tokens, len(counts))
        return batch, Masking.from_order(order, sorted(counts), known)

    def _tokens(self, batch: Batch) -> Tensor:
        """x_c: a fresh posterior sample of each image's latents, normalised, as tokens [B, N, C]."""
        assert batch.moments is not None
        mean, std = posterior(batch.moments)
        noise = rng.normal(self.cfg.seed, Stream.POSTERIOR, batch.index, *mean.shape[1:])
        return patchify(self.norm.normalise(mean + std * noise), self.cfg.model.patch)

    def _codes(
        self, batch: Batch, masking: Masking, epoch: float
    ) -> tuple[Tensor | None, Mixture | None, float, Tensor]:
        """The discrete tokens (Eqs. 10-12): the true codes, TI-Mix's mixture, λ, and the share of mixed-in tokens."""
        cfg, seed = self.cfg, self.cfg.seed
        share = ground_truth_share(cfg.ti_mix, epoch)
        nothing = torch.zeros(2, device=batch.labels.device)
        if cfg.model.guidance == "none":
            return None, None, share, nothing
        assert batch.codes is not None
        codes, mixture, generated = batch.codes, None, nothing
        if share < 1:
            rho = rng.uniform(seed, Stream.RHO, batch.index, cfg.model.tokens)
            mixture = Mixture(self._drawn(batch, masking, share), rho, torch.full((1,), share, device=rho.device))
            generated = torch.stack([(masking.masked & (rho >= share)).sum(), masking.masked.sum()]).float()
        if cfg.model.guidance_drop_prob > 0:
            drop = rng.uniform(seed, Stream.CODE_DROP, batch.index, 1) < cfg.model.guidance_drop_prob
            codes = codes.masked_fill(drop, -1)
            if mixture is not None:
                mixture = mixture._replace(drawn=mixture.drawn.masked_fill(drop, -1))
        return codes, mixture, share, generated

    def _drawn(self, batch: Batch, masking: Masking, share: float) -> Tensor:
        """x̂_d [B, N]. The prior runs only for images that use a token of it; the others keep their codes."""
        if batch.drawn is not None:
            return batch.drawn.codes
        assert self.prior is not None and batch.codes is not None
        asking = self._asking(batch, masking, share)
        if not asking:
            return batch.codes
        rows = to_device(torch.tensor(asking), batch.codes.device)
        u = None
        if self.cfg.ti_mix.draw == "sample":
            shape = (self.cfg.model.tokens, self.prior.config.splits)
            u = rng.uniform(self.cfg.seed, Stream.PRIOR_FILL, batch.index[rows], *shape)
        filled = fill(self.prior, batch.codes[rows], masking.masked[rows], batch.labels[rows], u)
        return batch.codes.index_copy(0, rows, filled)

    def _asking(self, batch: Batch, masking: Masking, share: float) -> list[int]:
        """The images with a masked position of ρ ≥ λ; ρ is drawn again on the host, without waiting for the device."""
        seed, n, index = self.cfg.seed, self.cfg.model.tokens, torch.tensor(batch.host_index)
        rho = rng.uniform(seed, Stream.RHO, index, n)
        order = rng.permutation(seed, Stream.MASK_ORDER, index, n)
        mixed = Masking.from_order(order, masking.hidden).masked & (rho >= share)
        return mixed.any(-1).nonzero()[:, 0].tolist()

    def open(self) -> None:
        self.frozen.open(self._needed)
        if self.cfg.model.guidance == "dc_mix" and self.cfg.model.code_dim is not None:
            self.frozen.tokenizer.codebook()  # DC-Mix maps it, so training needs the tokenizer's weights

    def preview(self, model: nn.Module) -> Tensor | None:
        if self.frozen.missing(self._needed):
            return None
        seeds = torch.arange(32)
        try:
            return self._pipeline(model)(seeds % self.cfg.data.classes, seeds)
        finally:
            self.frozen.rest([kind for kind in self._needed if kind != "prior" or self.prior is None])

    def export(self, model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
        if missing := self.frozen.missing(self._needed):
            log.info("the export does not include %s: the config names no weights of it", ", ".join(missing))
            section = to_dict(self.cfg.model) | {"attention": "auto"}  # as in the pipeline's export
            write_export(
                folder, "mixar", section, model.state_dict(), replace=True, sample=to_dict(self.cfg.sample),
                latents=self.norm.to_dict(), **about,
            )  # fmt: skip
        else:
            self._pipeline(model).save_pretrained(folder, replace=True, **about)

    @property
    def _needed(self) -> list[str]:
        """The frozen networks that sampling needs."""
        return ["vae"] if self.cfg.model.guidance == "none" else ["vae", "tokenizer", "prior"]

    def _pipeline(self, model: nn.Module) -> MixARPipeline:
        assert isinstance(model, MixAR)
        guided, frozen = self.cfg.model.guidance != "none", self.frozen
        return MixARPipeline(
            model, frozen.vae, self.norm, frozen.prior if guided else None, frozen.tokenizer if guided else None,
            self.cfg.sample, next(model.parameters()).device,
        )  # fmt: skip
