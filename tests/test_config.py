"""The config's layers and checks, every file in configs/, and the parameter totals of the paper's models."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixar.__main__ import main
from mixar.config import Config, check_inputs, images_per_pass, load_config, to_dict, to_yaml
from mixar.errors import UserError
from mixar.plan import make_plan, parameter_count
from tests.home import CONFIG

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
    "mixar_l_512": 559_373_376,
    "prior_14bit_512": 305_715_456,
    "vae_f16d32": 69_836_067 + 2_765_633,  # with a discriminator
    "tokenizer_14bit": 54_489_489 + 2_765_633,
}


# a string in each way in which yaml, omegaconf or a shell would make something else of it
STRINGS = ["runs/exp #2", "007", "2024_01_05", "1e3", "on", "null", "~", "12:30:00", "'quoted'", "a: b", "[x]", " x ",
           "runs/${seed}", r"a\${seed}", r"a\\${seed}", "${oc.env:HOME}", "back\\", "a=b", "é 日本 🙂"]  # fmt: skip


def keys(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Each dotted key with its type and its field."""
    kinds = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind, field


KEYS = {key: kind for key, kind, _ in keys()}


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


def write(folder: Path, files: dict[str, str]) -> Path:
    """Files of a folder; the first one's path."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder / next(iter(files))


def test_a_file_goes_over_its_bases_and_overrides_over_all(tmp_path: Path) -> None:
    file = write(tmp_path, {
        "own.yaml": "base: more/second.yaml\nseed: 3\ntrain: {epochs: 30}\n",
        "more/second.yaml": "base: ../first.yaml\nseed: 2\ntrain: {epochs: 20, keep: 20}\n",
        "first.yaml": "seed: 1\nrun_dir: 007\ntrain: {epochs: 10, keep: 10, log_every: 10, batch: 64}\n",
    })  # fmt: skip
    config = load_config(file, ["train.batch=32"])
    assert (config.seed, config.train.epochs, config.train.keep, config.train.log_every) == (3, 30.0, 20, 10)
    assert config.run_dir == "007" and config.train.batch == 32
    file.write_text(to_yaml(config))
    assert "base" not in file.read_text() and load_config(file) == config


def test_a_config_that_travels_with_mixar_is_a_base_by_its_name(file: Path) -> None:
    file.write_text("base: ti_mix_l\nseed: 5\n")
    assert load_config(file) == load_config("ti_mix_l", ["seed=5"])
    assert to_dict(load_config("ti_mix_l")) == to_dict(
        load_config("mixar_l", ["run_dir=runs/ti_mix_l", "ti_mix.enabled=true"])
    )


def test_a_copied_config_brings_its_base(tmp_path: Path, capsys) -> None:
    assert main(["configs", "ti_mix_l", "--copy", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixar_l.yaml", "ti_mix_l.yaml"]
    assert load_config(tmp_path / "ti_mix_l.yaml") == load_config("ti_mix_l")


def test_what_follows_a_value_follows_that_of_the_last_file(file: Path) -> None:
    file.write_text("base: mixar_l\ndata: {classes: 7}\n")
    assert load_config(file).model.classes == load_config(file).prior.classes == 7


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.yaml": "base: b.yaml"}, r"base: b.yaml in \S+/a.yaml names \S+/b.yaml, which does not exist: write"),
        ({"a.yaml": "base: bb.yaml", "b.yaml": ""}, r"/bb.yaml, which does not exist: .* Did you mean 'b.yaml'\?"),
        ({"a.yaml": "base: a.yaml"}, r"base: a.yaml in \S+/a.yaml makes a circle, \S+/a.yaml -> \S+/a.yaml: remove"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "base: a.yaml"}, r"in \S+/b.yaml .*/a.yaml -> \S+/b.yaml -> \S+/a.yaml"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "sed: 1"}, r"/b.yaml: unknown key 'sed'. Did you mean 'seed'\?"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "seed: x"}, r"/b.yaml: seed: "),
        ({"a.yaml": "base: b.yaml", "b.yaml": "- seed"}, r"/b.yaml must hold `key: value` lines"),
        ({"a.yaml": "base: more", "more/c.yaml": ""}, r"names \S+/more, which does not exist"),
        ({"a.yaml": "base: 3"}, r"/a.yaml has base: 3, which is not a path"),
        ({"a.yaml": 'base: "b\\0.yaml"'}, "which is not a path"),
        ({"a.yaml": "base:"}, r"/a.yaml has base: None, which is not a path"),
        ({"a.yaml": f"base: {'b' * 300}.yaml"}, r"cannot be read \(File name too long\)"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_is_refused(tmp_path: Path, files: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(write(tmp_path, files))


def test_a_base_stands_in_a_file_only() -> None:
    with pytest.raises(UserError, match="base=mixar_l: unknown key 'base'"):
        load_config(None, ["base=mixar_l"])


def test_later_overrides_win() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_what_follows_another_value_follows_it() -> None:
    config = load_config(None, ["data.classes=10", "data.image_size=512", "tokenizer.bits=10",
                                "vae.latent_channels=8", "model.encoder_width=96"])  # fmt: skip
    assert config.model.classes == config.prior.classes == 10
    assert config.model.grid == config.prior.grid == config.latent_grid == config.code_grid == 32
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


@pytest.mark.parametrize("text", STRINGS)
def test_a_string_is_taken_as_typed_and_comes_back_from_the_run_directory(file: Path, text: str) -> None:
    config = load_config(None, [f"run_dir={text}"])
    assert config.run_dir == text
    file.write_text(to_yaml(config))
    assert load_config(file).run_dir == text


@pytest.mark.parametrize("text", ["007", "2024_01_05", "on", "1e3", "12:30:00", "0x1f", "-1"])
def test_a_string_in_a_file_is_what_stands_there(file: Path, text: str) -> None:
    file.write_text(f"run_dir: {text}\ndata: {{images: {text}, labels: null}}\n")
    config = load_config(file)
    assert (config.run_dir, config.data.images, config.data.labels) == (text, text, None)


def test_null_takes_an_optional_string_away() -> None:
    config = load_config(CONFIGS / "mixar_l.yaml", ["vae.weights=null", "prior.weights=None"])
    assert (config.vae.weights, config.prior.weights) == (None, None)


def test_a_file_may_refer_to_what_a_command_gives(file: Path) -> None:
    file.write_text("data: {shards: '${run_dir}/shards'}\n")
    assert load_config(file, ["run_dir=runs/${x} #2"]).data.shards == "runs/${x} #2/shards"


def test_trust_is_of_one_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trusting = load_config(None, ["trust_pickle=true"])
    assert trusting.trust_pickle and "trust_pickle: false" in to_yaml(trusting)
    file.write_text("trust_pickle: true\n")
    assert load_config(file, ["trust_pickle=true"]).trust_pickle and not capsys.readouterr().err
    assert not load_config(file).trust_pickle
    assert capsys.readouterr().err.count("pass --trust-pickle") == 1


def test_every_number_has_a_range_and_every_word_its_choices() -> None:
    for key, kind, field in keys():
        follows = isinstance(field.default, str) and field.default.startswith("${")
        if kind not in (bool, bool | None, str, str | None) and not follows:
            low, high = field.metadata["limits"]
            assert math.isfinite(low) and math.isfinite(high) and low < high, key
        if "choices" in field.metadata:
            assert field.default is None or field.default in field.metadata["choices"], key


@pytest.mark.parametrize("key", KEYS)
def test_an_extreme_value_is_refused_by_its_name_or_can_be_planned_with(file: Path, key: str) -> None:
    """Of what was accepted, each value was trained with once, by hand: none ended in a traceback."""
    file.write_text(CONFIG.format(root="nowhere"))
    for text in ("", "-1", "0", "nan", "inf", "-inf", "1e30", "1" + 400 * "0", "[nan]", "[]"):
        try:
            config = load_config(file, [f"{key}={text}"])
        except UserError as error:
            assert key in str(error) and "\n" not in str(error)
            continue
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if KEYS[key] in (str, str | None):
            assert value == text and text
        elif KEYS[key] is not bool:
            assert all(math.isfinite(number) for number in (value if isinstance(value, list) else [value]))
            json.dumps(make_plan(config), allow_nan=False)


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
        (["optim.betas=[nan,0.9]"], "write a value from 0 to 0.999999"),
        (["optim.ema=1"], "write a value from 0 to 0.9999999"),
        (["optim.weight_decay=-5"], "write a value from 0 to 1000"),
        (["seed=9223372036854775808"], "write a value from 0 to 4294967295"),
        (["vae.multipliers=5"], "Write vae.multipliers=<list[int]>."),
        (["vae.multipliers=[nan]"], "Write vae.multipliers=<list[int]>."),
        (["vae.multipliers=[null]"], "Write vae.multipliers=<list[int]>."),
        (["vae.multipliers=[1,[2]]"], "write a value from 1 to 64"),
        (["vae.attention_levels=[???]"], "vae.attention_levels"),
        (["vae.attention_levels=[5]"], "write values from 0, the finest, to 4, or -1 for the deepest"),
        (["tokenizer.kind=vq"], "write tokenizer.code_dim=<channels>, such as 16"),
        (["tokenizer.code_dim=16"], "leave tokenizer.code_dim out, or write tokenizer.kind=vq"),
        (["vae.width=1000000000000000000"], "write a value from 1 to 65536"),
        (["sample.cfg_interval=[nan,1]"], "write a value from 0 to 1"),
        (["sample.cfg_interval=[0.5]"], "as in sample.cfg_interval=[0.25,1]"),
        (["sample.diffusion_steps=abc"], "write a count such as 100, sections such as 10,5, or ddim50"),
        (["sample.diffusion_steps=ddim0"], "not a respacing of 1000 steps"),
        (["sample.diffusion_steps=1001"], "write 1000 or fewer"),
        (["model.process=flow", "sample.diffusion_steps=ddim50"], "write sample.diffusion_steps=25"),
        (["model.process=vp"], "write one of ddpm, flow"),
        (["sample.diffusion_start=49"], "write 50 or fewer, or sample.diffusion_start=999"),
        (["run_dir="], "'run_dir=' gives no value"),
        (["train.micro_batch="], "write train.micro_batch=<value>, or leave train.micro_batch out"),
        (["init_from= "], "init_from= is empty"),
        (["data.shards=a\x1b[2J"], r"data.shards='a\x1b[2J' has a control character"),
        (["data.images=\udcff"], "is not UTF-8"),
        (["run_dir=???"], "write run_dir=<value>"),
        (["data={images: [x]}"], "data.images"),
        (["data..images=x"], "unknown key 'data.'"),
        # impossible combinations
        (["model.encoder_heads=7"], "write model.encoder_heads=6"),
        (["prior.heads=7"], "write prior.heads=8"),
        (["tokenizer.bits=13"], "write prior.splits=1"),
        (["data.image_size=250"], "write data.image_size=240"),
        (["vae.perceptual_weight=0.1", "task=vae"], "write vae.perceptual_features=<a classifier's export, or"),
        (
            ["tokenizer.discriminator_weight=0.1", "task=tokenizer", "data.image_size=16"],
            "images of at least 24 pixels, not data.image_size=16: write tokenizer.discriminator_weight=0",
        ),
        (["model.patch=2", "model.grid=16"], "write model.grid=8"),
        (["model.patch=32"], "write model.patch=16"),
        (["tokenizer.multipliers=[1,1,2]"], "write tokenizer.multipliers with 5 entries"),
        (["sample.prior_steps=513"], "write sample.prior_steps=512 or less"),
        (["ti_mix.enabled=true", "model.guidance=none"], "write model.guidance=dc_mix, or ti_mix.enabled=false"),
        (["mask.group=12"], "write mask.group=4, or train.batch=2052"),
        (["mask.group=12", "train.batch=24", "train.micro_batch=8"], "write mask.group=6, or train.micro_batch=12"),
        (["model.code_dim=16"], "model.code_dim=16 and tokenizer.code_dim=null must be equal"),
        (["model.latent_channels=4"], "write model.latent_channels=32, or vae.latent_channels=4"),
    ],
)
def test_a_mistake_is_told_with_what_to_write(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    message = str(error.value)
    assert told in message and "\n" not in message
    assert overrides[0].split("=")[0].split(".")[0] in message, "names what was given"


@pytest.mark.parametrize(
    ("overrides", "ranks", "images"),
    [
        (["train.micro_batch=64"], 1, 64),
        (["train.micro_batch=64"], 64, 32),  # a rank's whole share
        (["train.batch=96", "train.micro_batch=40"], 1, 32),  # the largest divisor of whole mask groups
        (["train.batch=96", "train.micro_batch=40", "mask.ratio_scope=batch"], 2, 24),
        (["train.batch=100", "train.micro_batch=64", "task=prior"], 1, 50),
        (["train.batch=96", "train.micro_batch=null"], 3, 32),
    ],
)
def test_a_micro_batch_is_the_largest_that_fits(overrides: list[str], ranks: int, images: int) -> None:
    assert images_per_pass(load_config(None, overrides), ranks) == images


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1\n", "must hold `key: value` lines"),
        ("train: [\n", "is not valid yaml"),
        ("train:\n", "'train' is a section"),
        ("train: {epoch: 3}\n", "Did you mean 'train.epochs'?"),
        ("train: {batch: many}\n", "Write train.batch=<int>."),
        ("seed: ${nope}\n", "Interpolation key 'nope' not found"),
        ("run_dir: ${run_dir}\n", "run_dir"),
        ("run_dir: ???\n", "write run_dir=<value>"),
        ("train: {batch: '${run_dir}'}\n", "train.batch"),
        ("vae: {multipliers: '${vae.width}'}\n", "int is not a ListConfig"),
        ("run_dir: ''\n", "run_dir= is empty"),
        ("run_dir: [a]\n", "run_dir"),
        ("run_dir: null\n", "Write run_dir=<str>."),
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("train:\n\tbatch: 3\n", "is not valid yaml"),
        ("1: 2\n", "unknown key '1'"),
        ("null: 2\n", "is not valid yaml"),
        ("[1, 2]: 3\n", "is not valid yaml"),
        ("train: {1: 2}\n", "unknown key 'train.1'"),
        ("5\n", "is not valid yaml"),
        ("words\n", "unknown key 'words'"),
        ("seed: 1\n---\nseed: 2\n", "is not valid yaml"),
        ("a: " + 5000 * "[", "is not valid yaml"),
        ("run_dir: \x07\n", "is not valid yaml"),
        ("run_dir: !!python/object/apply:os.getcwd []\n", "is not valid yaml"),
        (b"run_dir: caf\xe9\n", "is not text in UTF-8"),
        (b"\xff\xfes\x00", "is not text in UTF-8"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_or_the_key(file: Path, text: str | bytes, told: str) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_config(file)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_told_with_the_one_meant() -> None:
    with pytest.raises(UserError, match=r"Did you mean '.*mixar_l\.yaml'"):
        load_config(CONFIGS / "mixarl.yaml")


def test_a_folder_or_a_closed_path_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder: name a yaml file"):
        load_config(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read .*: name a yaml file"):
        load_config(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="no config file at"):
        load_config(CONFIGS / "mixar_l.yaml" / "x.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(file: Path) -> None:
    file.write_bytes("\ufeffseed: 3\n".encode())
    assert load_config(file).seed == 3


def test_what_a_run_will_read_is_looked_for(tmp_path: Path) -> None:
    weights = [f"{name}.weights={tmp_path}/{name}" for name in ("vae", "tokenizer", "prior")]
    others = [f"init_from={tmp_path}/init", f"engine.deepspeed={tmp_path}/ds.json"]
    with pytest.raises(UserError) as error:
        check_inputs(load_config(None, weights + others), resumes=False)
    assert all(text in str(error.value) for text in weights + others)
    # without guidance neither is read
    check_inputs(load_config(None, ["model.guidance=none", *weights[1:]]), resumes=False)
    check_inputs(load_config(None, ["task=vae", *weights]), resumes=False)
    (tmp_path / "prior").mkdir()
    with pytest.raises(UserError, match=r"^tokenizer.weights=\S+ is not there: write tokenizer.weights=<its path>$"):
        check_inputs(load_config(None, weights[1:]), resumes=False)


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
        ("mixar_l_512", {"steps": 250_228, "decoder_tokens": 1088}),
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


def test_a_script_gets_a_value_as_it_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("run_dir: 2024-01-05 a  b # a comment\n")
    for key, told in (("run_dir", "2024-01-05 a  b"), ("train.batch", "32")):
        assert main(["plan", str(file), "train.batch=32", "--print", key]) == 0
        assert capsys.readouterr().out == f"{told}\n"
    assert main(["plan", str(file), "--print", "rundir"]) == 2
    assert "Did you mean 'run_dir'?" in capsys.readouterr().err


def test_the_command_line_tells_a_mistake_in_one_line() -> None:
    done = command("plan", "configs/mixar_l.yaml", "train.epoch=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mixar plan: train.epoch=3: unknown key 'train.epoch'. Did you mean 'train.epochs'?\n"
