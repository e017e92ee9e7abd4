"""The frozen networks that a training uses: opened at its start, and checked against the config and the shards."""

from functools import cached_property
from pathlib import Path
from typing import Any

from mixar.codecs import VAE, Tokenizer, load_tokenizer, load_vae
from mixar.config import Config
from mixar.errors import UserError
from mixar.prior import Prior, load_prior
from mixar.weights import describe_export, find_export, fingerprint, not_finite_in

# keys that must be equal in a network's own config and the run's; the image size may differ, as for any convolution
GEOMETRY = {
    "vae": {"latent_channels": "latent channels", "levels": "levels"},
    "tokenizer": {"kind": "as its kind", "bits": "bits per token", "code_dim": "channels per code", "levels": "levels"},
    "prior": {"bits": "bits per token", "grid": "tokens along a side", "classes": "classes"},
}


class Frozen:
    """The networks that `<kind>.weights` of a config name, each opened on its first access, on the CPU.

    Args:
        made: the fingerprints of the VAE and the tokenizer that made the shards, by kind, as far as they are known.

    Raises:
        UserError: on access to a network: its weights are missing or not finite, have another geometry than the
            config's, or are not those that made the shards.
    """

    def __init__(self, cfg: Config, made: dict[str, Any]) -> None:
        self.cfg, self.made = cfg, made
        self.fingerprints: dict[str, str] = {}  # of the open networks

    @cached_property
    def vae(self) -> VAE:
        return self._checked("vae", load_vae(self.cfg.vae, self.cfg.trust_pickle))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self._checked("tokenizer", load_tokenizer(self.cfg.tokenizer, self.cfg.trust_pickle))

    @cached_property
    def prior(self) -> Prior:
        prior = self._checked("prior", load_prior(self.cfg.prior, self.cfg.trust_pickle))
        weights = Path(str(self.cfg.prior.weights))
        learned = describe_export(find_export(weights)).get("tokenizer") if weights.is_dir() else None
        if learned is not None and learned != self.made.get("tokenizer", learned):
            raise UserError(
                f"prior.weights={self.cfg.prior.weights} was trained on the tokens of another tokenizer (fingerprint "
                f"{learned}) than that of the shards ({self.made['tokenizer']}): name a prior trained on these shards"
            )
        return prior

    def missing(self, kinds: list[str]) -> list[str]:
        """Those of `kinds` without weights in the config."""
        return [kind for kind in kinds if getattr(self.cfg, kind).weights is None]

    def open(self, kinds: list[str]) -> None:
        """Open those of `kinds` with weights in the config."""
        for kind in kinds:
            if getattr(self.cfg, kind).weights is not None:
                getattr(self, kind)

    def rest(self, kinds: list[str]) -> None:
        """Move them back to the CPU, since training needs the device's memory."""
        for kind in kinds:
            getattr(self, kind).to("cpu")

    def _checked(self, kind: str, network: Any) -> Any:
        section = getattr(self.cfg, kind)
        for name, words in GEOMETRY[kind].items():
            found, wanted = _measure(network.config, name), _measure(section, name)
            if found != wanted:
                raise UserError(
                    f"{kind}.weights={section.weights} has {found} {words}, but the config has {wanted}: name weights "
                    f"of the config's geometry, or write the geometry of these weights in the config's section {kind}"
                )
        if broken := not_finite_in(network.state_dict()):
            raise UserError(
                f"{kind}.weights={section.weights} has weights that are not finite, such as {broken}: name intact "
                f"ones, or train the {kind} again with a lower optim.lr"
            )
        given = self.fingerprints[kind] = fingerprint(network.state_dict())
        made = self.made.get(kind)
        if made is not None and made != given:
            raise UserError(
                f"the shards were made with another {kind} (fingerprint {made}) than {kind}.weights={section.weights} "
                f"(fingerprint {given}): name that {kind}, or run `mixar prepare` with this one and another data.shards"
            )
        return network


def _measure(config: Any, name: str) -> Any:
    return len(config.multipliers) if name == "levels" else getattr(config, name)
