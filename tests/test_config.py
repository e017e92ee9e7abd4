"""The config's layers and checks, every file in configs/, and the parameter totals of the paper's models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixar.__main__ import main
from mixar.config import Config, load_config, to_dict, to_yaml
from mixar.errors import UserError
from mixar.plan import make_plan, parameter_count

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(CONFIGS.rglob("*.yaml"), key=str)
IMAGENET = 1_281_167

PARAMETERS = {
    "mar_b": 207_924_768,
    "mar_l": 478_326_304,
    "mar_h": 942_403_104,
    "mixar_b": 207_996_992,
    "mixar_l": 557_014_080,
    "mixar_h": 942_515_264,
    "dc_sa_l": 574_301_248,
    "dc_ca_l": 707_994_688,
    "ti_mix_l": 557_014_080,
    "prior_14bit": 304_929_024,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def command(*arguments: str) -> subprocess.CompletedProcess:
    """`mixar` as a user runs it, in the repository."""
    return subprocess.run(
        [sys.executable, "-m", "mixar", *arguments],
        capture_output=True, text=True, cwd=CONFIGS.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_defaults_yield_to_yaml_and_yaml_to_overrides(file: Path) -> None:
    file.write_text("train:\n  batch: 64\n  epochs: 3\n")
    config = load_config(file, ["train.batch=32", "optim.lr=1e-3"])
    assert (config.train.batch, config.train.epochs, config.train.precision) == (32, 3.0, "bf16")
    assert config.optim.lr == 1e-3


def test_later_overrides_win() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_what_follows_another_value_follows_it() -> None:
    config = load_config(None, ["data.classes=10", "data.image_size=512", "model.grid=32", "tokenizer.bits=10",
                                "vae.latent_channels=8", "model.encoder_width=96"])  # fmt: skip
    assert config.model.classes == config.prior.classes == 10
    assert config.vae.image_size == config.tokenizer.image_size == 512
    assert config.prior.grid == config.vae.grid == config.tokenizer.grid == 32
    assert config.model.code_bits == config.prior.bits == 10
    assert config.model.latent_channels == config.model.token_dim == 8
    assert config.model.decoder_width == 96


def test_a_followed_value_can_be_set_apart_where_that_works() -> None:
    config = load_config(None, ["model.decoder_width=512", "model.decoder_heads=8"])
    assert (config.model.encoder_width, config.model.decoder_width) == (768, 512)


def test_yaml_round_trip(file: Path) -> None:
    overrides = ["optim.betas=[0.9,0.99]", "optim.lr=3.3e-5", "train.micro_batch=32"]
    config = load_config(CONFIGS / "ti_mix_l.yaml", overrides)
    file.write_text(to_yaml(config))
    again = load_config(file)
    assert isinstance(again, Config)
    assert to_dict(again) == to_dict(config) and again.optim.lr == 3.3e-5


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        # unknown keys
        (["train.epoch=3"], "unknown key 'train.epoch'. Did you mean 'train.epochs'?"),
        (["trian.epochs=3"], "unknown key 'trian'. Did you mean 'train'?"),
        (["classes=10"], "Did you mean 'data.classes' or 'prior.classes' or 'model.classes'?"),
        (["mask.zzz=1"], "Known: minimum, std, ratio_scope, group"),
        # wrong types
        (["train.batch=many"], "Write train.batch=<int>."),
        (["train.batch=1.5"], "Write train.batch=<int>."),
        (["data.flip=maybe"], "Write data.flip=<bool>."),
        (["optim.betas=[a,b]"], "Write optim.betas=<list[float]>."),
        (["data.classes=null"], "Write data.classes=<int>."),
        (["train=3"], "'train' is a section, write train.epochs=..."),
        (["train.batch"], "write key=value"),
        (["train.batch={"], "cannot be read"),
        # impossible values
        (["model.guidance=dcmix"], "write one of none, dc_mix, dc_sa, dc_ca"),
        (["train.batch=0"], "write a value from 1 to 16777216"),
        (["train.epochs=nan"], "write a value from 0 to 1000000"),
        (["mask.minimum=1.5"], "write a value from 0 to 1"),
        (["prior.splits=0"], "write a value from 1 to "),
        (["model.encoder_heads=0"], "write a value from 1 to "),
        (["optim.betas=[0.9]"], "as in optim.betas=[0.9,0.95]"),
        (["vae.multipliers=[]"], "as in vae.multipliers=[1,2,4]"),
        # impossible combinations
        (["model.encoder_heads=7"], "write model.encoder_heads=6"),
        (["prior.heads=7"], "write prior.heads=8"),
        (["tokenizer.bits=13"], "write prior.splits=1"),
        (["data.image_size=250"], "write data.image_size=240"),
        (["model.patch=2"], "write model.grid=8"),
        (["model.patch=32"], "write model.patch=16"),
        (["tokenizer.multipliers=[1,1,2]"], "write tokenizer.multipliers with 5 entries"),
        (["sample.prior_steps=513"], "write sample.prior_steps=512 or less"),
        (["ti_mix.enabled=true", "model.guidance=none"], "write model.guidance=dc_mix, or ti_mix.enabled=false"),
        (["train.batch=100", "train.micro_batch=64"], "write train.batch=128"),
        (["mask.group=12"], "write mask.group=4"),
        (["model.latent_channels=4"], "write vae.latent_channels=4 and leave model.latent_channels out"),
    ],
)
def test_a_mistake_is_told_with_what_to_write(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    message = str(error.value)
    assert told in message and "\n" not in message
    assert overrides[0].split("=")[0].split(".")[0] in message, "names what was given"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1\n", "must hold `key: value` lines"),
        ("train: [\n", "is no valid yaml"),
        ("train:\n", "'train' is a section"),
        ("train: {epoch: 3}\n", "Did you mean 'train.epochs'?"),
        ("train: {batch: many}\n", "Write train.batch=<int>."),
        ("seed: ${nope}\n", "Interpolation key 'nope' not found"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_or_the_key(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_told_with_the_one_meant() -> None:
    with pytest.raises(UserError, match=r"Did you mean '.*mixar_l\.yaml'"):
        load_config(CONFIGS / "mixarl.yaml")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_plans(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] > 0
    assert plan["memory"]["total"] == 5 * 4 * plan["parameters"]
    config = load_config(path)
    if path.parent == CONFIGS:
        assert config.run_dir == f"runs/{path.stem}" and plan["images"] == IMAGENET


def test_the_paper_s_runs_are_all_there() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize(("name", "total"), PARAMETERS.items())
def test_parameters_to_the_last_digit(name: str, total: int) -> None:
    assert parameter_count(load_config(CONFIGS / f"{name}.yaml")) == total


@pytest.mark.parametrize(("task", "total"), [("tokenizer", 54_489_489), ("vae", 69_836_067)])
def test_codec_parameters_to_the_last_digit(task: str, total: int) -> None:
    assert parameter_count(load_config(None, [f"task={task}"])) == total


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("prior_14bit", {"steps": 1_350_000}),
        ("mixar_l", {"steps": 250_228, "decoder_tokens": 320}),
        ("dc_sa_l", {"decoder_tokens": 576}),
        ("dc_ca_l", {"decoder_tokens": 320}),
    ],
)
def test_length_and_tokens(name: str, figures: dict[str, Any]) -> None:
    assert make_plan(load_config(CONFIGS / f"{name}.yaml")).items() >= figures.items()


def test_the_images_are_the_shards_when_there_are_some(tmp_path: Path) -> None:
    assert make_plan(load_config(None, ["task=vae", "data.count=7", f"data.shards={tmp_path}"]))["images"] == 7
    assert make_plan(load_config(None, ["task=vae", f"data.shards={tmp_path}"]))["steps"] is None


@pytest.mark.parametrize("name", ["dc_ca_l", "prior_14bit"])
def test_the_command_line_prints_the_parameters(name: str) -> None:
    done = command("plan", f"configs/{name}.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == PARAMETERS[name]


def test_the_command_line_tells_a_mistake_in_one_line() -> None:
    done = command("plan", "configs/mixar_l.yaml", "train.epoch=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mixar plan: train.epoch=3: unknown key 'train.epoch'. Did you mean 'train.epochs'?\n"
