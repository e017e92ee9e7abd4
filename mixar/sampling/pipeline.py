"""From labels and seeds to images: the released model as one object."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mixar.codecs import VAE, LatentNorm, Tokenizer, load_tokenizer, load_vae, to_bytes
from mixar.config import (
    ModelConfig,
    PriorConfig,
    SampleConfig,
    TokenizerConfig,
    VAEConfig,
    check_sample,
    section_from_dict,
    to_dict,
)
from mixar.dist import fast_precision
from mixar.errors import SettingError, UserError, not_finite
from mixar.files import creating_folder
from mixar.model import MixAR, process_of, unpatchify
from mixar.prior import Prior, keyed_draws, load_prior, sample_codes
from mixar.sampling.autoregressive import compiled_step, diffusion_step, sample_tokens
from mixar.sampling.reordered import reorder_linears
from mixar.weights import (
    describe_export,
    find_export,
    fingerprint,
    is_export,
    loaded,
    not_finite_in,
    read_export,
    write_network,
)


class MixARPipeline:
    """Generates images: discrete tokens from the prior, continuous tokens from the model, pixels from the VAE.

    Args:
        model: MixAR with its EMA weights.
        norm: the latents' normalisation.
        prior, tokenizer: the discrete side; None for `guidance: none`.
        settings: sampling defaults.
        device: by default an accelerator where there is one.
        precision: `bf16` or `fp32`, of the model and the prior; by default the faster one of the device. The codecs
            decode in float32.
        compile: the diffusion step by torch.compile, for many images on a GPU: a CUDA graph for each number of rows,
            and the first images wait for it. On a CPU it gains nothing.
    """

    def __init__(
        self, model: MixAR, vae: VAE, norm: LatentNorm, prior: Prior | None, tokenizer: Tokenizer | None,
        settings: SampleConfig, device: torch.device | str | None = None, precision: str | None = None,
        compile: bool = False,
    ) -> None:  # fmt: skip
        _check_geometry(model, vae, prior, tokenizer)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = precision or fast_precision(self.device)
        self.settings = settings
        self.norm = norm.to(self.device)
        self.model = model.to(self.device).eval()
        self.vae = vae.to(self.device)
        self.prior = None if prior is None else prior.to(self.device)
        self.tokenizer = None if tokenizer is None else tokenizer.to(self.device)
        self.fingerprints: dict[str, str] = {}  # of networks that were read from exports
        self._diffusion_step = compiled_step(self.device) if compile else diffusion_step

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, precision: str | None = None,
        compile: bool = False,
    ) -> "MixARPipeline":  # fmt: skip
        """The pipeline that `mixar export` wrote, or the newest export of a run directory.

        On a CPU its linear layers run on reordered weights, which take their memory once more (`reorder_linears`).

        Raises:
            UserError: no export there, or one that is torn, of another kind, without the codecs and the prior, or of
                weights that are not finite.
        """
        folder = find_export(Path(path))
        about, state = read_export(folder, "mixar")
        cfg = section_from_dict(ModelConfig, about["config"], str(folder / "config.json"))
        guided = cfg.guidance != "none"
        needed = ["vae", "tokenizer", "prior"] if guided else ["vae"]
        missing = [kind for kind in needed if not is_export(folder / kind)]
        if missing:
            raise UserError(
                f"{folder} was exported without {', '.join(missing)}: name the weights of each, "
                f"mixar export RUN {' '.join(f'{kind}.weights=PATH' for kind in missing)} --out FOLDER"
            )
        for kind, known in about.get("networks", {}).items():
            if kind in needed and describe_export(folder / kind).get("fingerprint") != known:
                raise UserError(
                    f"{folder / kind} holds other weights than the {kind} that this model was exported with "
                    f"(fingerprint {known}): bring that one back, or export again with {kind}.weights=PATH"
                )
        pipeline = cls(
            loaded(lambda: MixAR(cfg), state, folder),
            load_vae(VAEConfig(weights=str(folder / "vae"))),
            LatentNorm.from_dict(about["latents"]),
            load_prior(PriorConfig(weights=str(folder / "prior"))) if guided else None,
            load_tokenizer(TokenizerConfig(weights=str(folder / "tokenizer"))) if guided else None,
            section_from_dict(SampleConfig, about["sample"], str(folder / "config.json")),
            device,
            precision,
            compile,
        )
        for name, network in pipeline.networks.items():
            described = about if name == "model" else describe_export(folder / name)
            # what reading has found right; the oldest exports have none
            pipeline.fingerprints[name] = described.get("fingerprint") or fingerprint(network.state_dict())
            if not_finite_in(network.state_dict()):
                raise UserError(
                    f"the weights of the {name} in {folder} are not finite: its training went wrong; export an earlier "
                    "checkpoint, or train it again with a lower optim.lr"
                )
            if not compile:
                reorder_linears(network)
        return pipeline

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks there are, by name: model, vae, tokenizer, prior."""
        every = {"model": self.model, "vae": self.vae, "tokenizer": self.tokenizer, "prior": self.prior}
        return {name: network for name, network in every.items() if network is not None}

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.model.config.grid * self.model.config.patch * self.vae.config.stride

    def save_pretrained(self, path: str | Path, replace: bool = False, **about: Any) -> Path:
        """Write model, codecs and prior as one folder of safetensors with a config.json each.

        Args:
            replace: a folder of that name makes room for this one.
            about: further entries of config.json, such as the images seen.

        Raises:
            UserError: the folder exists.
        """
        networks: dict[str, str] = {}  # the fingerprints of the frozen ones
        about |= {"latents": self.norm.to_dict(), "networks": networks}
        model = to_dict(self.model.config) | {"attention": "auto"}  # what trained it need not be where it samples
        with creating_folder(path, replace) as aside:
            for kind, network in self.networks.items():
                if kind != "model":  # where its weights once lay means nothing to who gets the folder
                    section = to_dict(network.config) | {"weights": None}
                    networks[kind] = write_network(aside / kind, kind, section, network.state_dict())
            write_network(aside, "mixar", model, self.model.state_dict(), sample=to_dict(self.settings), **about)
        return Path(path)

    def with_settings(self, **changes: Any) -> "MixARPipeline":
        """The same networks under other settings of `SampleConfig`, such as cfg_scale=2.0, or **PRESETS["fast"].

        Raises:
            UserError: settings that do not go together.
        """
        other = copy.copy(self)
        other.settings = replace(self.settings, **changes)
        check_sample(other.settings)
        return other

    def __call__(
        self, labels: Tensor | Sequence[int], seeds: Tensor | Sequence[int], codes: Tensor | None = None,
        progress: str | None = None,
    ) -> Tensor:  # fmt: skip
        """Images of these classes.

        Args:
            labels: [B] class indices.
            seeds: [B], one per image: image i depends on `seeds[i]` alone, not on the batch.
            codes: discrete tokens [B, N] to go by; by default the prior draws them.
            progress: the caption of a progress bar; None shows none.

        Returns:
            uint8 [B, 3, H, W].

        Raises:
            UserError: labels out of range, not as many seeds as labels, settings that this model cannot follow,
                images that are not finite, or more images at once than the GPU has memory for.
        """
        return torch.cat(list(self.stream(labels, seeds, codes, progress)))

    def stream(
        self, labels: Tensor | Sequence[int], seeds: Tensor | Sequence[int], codes: Tensor | None = None,
        progress: str | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The images of a call, `settings.batch` at a time and in constant memory."""
        labels, seeds = self.checked(labels, seeds)
        for rows in self._batches(len(labels), progress):
            some_labels, some_seeds = labels[rows].to(self.device), seeds[rows].to(self.device)
            some_codes = None if codes is None else codes[rows].to(self.device)
            yield self._images(some_labels, some_seeds, some_codes)

    def sample_codes(
        self, labels: Tensor | Sequence[int], seeds: Tensor | Sequence[int], progress: str | None = None
    ) -> Tensor:
        """The prior's discrete tokens x̂_d alone, int64 [B, N] on the CPU: those that a call of these seeds goes by.

        Raises:
            UserError: as a call, or a model without discrete guidance.
        """
        if self.prior is None:
            raise UserError("this model has guidance none: it samples without discrete tokens, drop the prior")
        labels, seeds = self.checked(labels, seeds)
        batches = self._batches(len(labels), progress)
        draw = self._draw_codes
        return torch.cat([draw(self.prior, labels[b].to(self.device), seeds[b].to(self.device)).cpu() for b in batches])

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Discrete tokens [B, N] through their own tokenizer: uint8 [B, 3, H, W]."""
        assert self.tokenizer is not None, "decoding discrete tokens needs the tokenizer"
        images = [self.tokenizer.decode(codes[b].to(self.device)) for b in self._batches(len(codes))]
        for decoded in images:
            if not decoded.isfinite().all():
                raise not_finite("tokenizer")
        return to_bytes(torch.cat(images)).cpu()

    def checked(self, labels: Tensor | Sequence[int], seeds: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Labels and seeds as int64 [B] each, for what a call can draw.

        Raises:
            UserError: labels out of range, not as many seeds as labels, or settings that this model cannot follow.
        """
        labels, seeds = torch.as_tensor(labels), torch.as_tensor(seeds)
        classes = self.model.config.classes
        if labels.ndim != 1 or labels.shape != seeds.shape:
            shapes = f"{list(labels.shape)} labels and {list(seeds.shape)} seeds"
            raise UserError(f"{shapes} were given: give one list of both, with one seed per label")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"labels must lie in 0..{classes - 1}, given: {sorted(set(labels.tolist()))[:10]}")
        if self.prior is not None:
            most, steps = self.prior.config.grid**2 * self.prior.config.splits, self.settings.prior_steps
            if steps > most:  # there MaskBit's loop masks everything again
                raise UserError(f"{steps} prior steps exceed the {most} sub-tokens of an image: take {most} or fewer")
        # a late start leaves few steps to take
        process_of(self.model.config.process, self.settings.diffusion_steps, self.settings.diffusion_start)
        return labels, seeds

    def _batches(self, count: int, progress: str | None = None) -> Iterator[slice]:
        with tqdm(total=count, desc=progress, unit="image", disable=progress is None) as bar:
            for start in range(0, count, self.settings.batch):
                rows = slice(start, min(start + self.settings.batch, count))
                yield rows
                bar.update(rows.stop - rows.start)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _images(self, labels: Tensor, seeds: Tensor, codes: Tensor | None) -> Tensor:
        """The images of one batch; see `__call__`."""
        try:
            if codes is None and self.prior is not None:
                codes = self._draw_codes(self.prior, labels, seeds)
            return self._decode(self._draw_tokens(labels, seeds, codes))
        except torch.OutOfMemoryError as error:
            if len(labels) == 1:
                raise
            raise SettingError(
                f"the GPU is out of memory for {len(labels)} images at once: write {{}}",
                ("sample.batch", len(labels) // 2),
            ) from error

    def _draw_codes(self, prior: Prior, labels: Tensor, seeds: Tensor) -> Tensor:
        u, gumbel = keyed_draws(seeds, prior.config.grid**2, prior.config.splits)
        with self._autocast():
            return sample_codes(prior, labels, self.settings, u, gumbel)

    def _draw_tokens(self, labels: Tensor, seeds: Tensor, codes: Tensor | None) -> Tensor:
        with self._autocast():
            return sample_tokens(self.model, labels, codes, seeds, self.settings, self._diffusion_step)

    @torch.no_grad()
    def _decode(self, tokens: Tensor) -> Tensor:
        latents = self.norm.denormalise(unpatchify(tokens, self.model.config.patch))
        images = self.vae.decode(latents)
        for network, output in (("model", tokens), ("vae", images)):
            if not output.isfinite().all():
                raise not_finite(network)
        return to_bytes(images).cpu()


def _check_geometry(model: MixAR, vae: VAE, prior: Prior | None, tokenizer: Tokenizer | None) -> None:
    """UserError where the networks' tokens are not the model's: cut to its size, they would be others."""
    cfg = model.config
    pairs: list[tuple[str, str, int | None, int | None]] = []
    pairs += [("VAE", "latent channels", vae.config.latent_channels, cfg.latent_channels)]
    if prior is not None:
        pairs += [("prior", "bits per token", prior.config.bits, cfg.code_bits)]
        pairs += [("prior", "tokens along a side", prior.config.grid, cfg.grid)]
        pairs += [("prior", "classes", prior.config.classes, cfg.classes)]
    if tokenizer is not None:
        pairs += [("tokenizer", "bits per token", tokenizer.config.bits, cfg.code_bits)]
        pairs += [("tokenizer", "channels per code", tokenizer.config.code_dim, cfg.code_dim)]
    for network, what, found, wanted in pairs:
        if found != wanted:
            raise UserError(f"the {network} has {found} {what}, the model {wanted}: name the one it was trained with")
