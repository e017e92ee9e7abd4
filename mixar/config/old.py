"""Configs and exports of earlier versions, whose keys are translated to the current ones on reading."""

from typing import Any

# values of keys that are newer than some exports, by section
MISSING: dict[str, dict[str, Any]] = {"model": {"code_dim": None}}
RENAMED = {  # of `sample`, when "guidance" meant both how discrete tokens enter and classifier-free guidance
    "guidance": "cfg_scale", "guidance_schedule": "cfg_schedule", "guidance_interval": "cfg_interval",
    "prior_guidance": "prior_cfg_scale", "prior_guidance_schedule": "prior_cfg_schedule",
    "prior_guidance_power": "prior_cfg_power",
}  # fmt: skip


def upgrade(sections: dict[str, Any], image_size: int | None = None, multipliers: list[int] | None = None) -> None:
    """Rewrite sections of a config in place. They are as read from a file, with unchecked values.

    Args:
        image_size, multipliers: `data.image_size` and `vae.multipliers`, if they are missing in the sections.
    """
    vae, tokenizer = _section(sections, "vae"), _section(sections, "tokenizer")
    # both codecs kept the data's image size, and attention went by the side of a feature map of such an image
    size = vae.pop("image_size", _section(sections, "data").get("image_size", image_size))
    tokenizer.pop("image_size", None)
    factors, sides = vae.get("multipliers", multipliers), vae.get("attention")
    if isinstance(size, int) and isinstance(factors, list) and isinstance(sides, list):
        del vae["attention"]
        vae["attention_levels"] = [i - len(factors) for i in range(len(factors)) if size >> i in sides]
    if sample := _section(sections, "sample"):
        sections["sample"] = renamed(sample)


def renamed(sample: dict[str, Any]) -> dict[str, Any]:
    """Sampling settings under their current names."""
    return {RENAMED.get(name, name): value for name, value in sample.items()}


def _section(sections: dict[str, Any], name: str) -> dict[str, Any]:
    found = sections.get(name)
    return found if isinstance(found, dict) else {}
