"""A config and an export of the version before attention went by level: tests/old was written by it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mixar.codecs import VAE, load_vae
from mixar.config import VAEConfig, load_config, to_yaml
from mixar.sampling import MixARPipeline

OLD = Path(__file__).parents[1] / "old"  # 16-pixel images, levels of sides 16, 8 and 4, attention at 8 and 4


def test_an_old_config_is_read(tmp_path: Path) -> None:
    config = load_config(OLD / "config.yaml")
    assert config.vae.attention_levels == [-2, -1]
    assert config.sample.cfg_scale == 2.0 and config.sample.prior_cfg_scale == 7.1
    (tmp_path / "now.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "now.yaml") == config
    exported = load_vae(VAEConfig(weights=str(OLD / "export" / "vae")))
    assert exported.state_dict().keys() == VAE(config.vae).state_dict().keys()


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("vae: {attention: [16]}", [-1]),  # of 256 pixels in five levels, the defaults
        ("data: {image_size: 512}\nvae: {attention: [32]}", [-1]),
        ("data: {image_size: 32}\nvae: {multipliers: [1, 2, 4, 4], attention: [4, 16, 64]}", [-3, -1]),
        ("vae: {attention: []}", []),
    ],
)
def test_sides_become_levels(tmp_path: Path, text: str, levels: list[int]) -> None:
    (tmp_path / "old.yaml").write_text(f"task: vae\n{text}\n")
    assert load_config(tmp_path / "old.yaml").vae.attention_levels == levels
    # what stands behind it on the command line wins
    assert load_config(tmp_path / "old.yaml", ["vae.attention_levels=[0]"]).vae.attention_levels == [0]


def test_an_old_export_draws_what_it_drew() -> None:
    pipeline = MixARPipeline.from_pretrained(OLD / "export", "cpu", "fp32")
    assert pipeline.image_size == 16 and pipeline.settings.cfg_scale == 2.0
    expected = load_file(OLD / "images.safetensors")["images"]
    assert (pipeline([0, 1, 2], [5, 6, 7]).int() - expected.int()).abs().max() <= 1
