"""Facts in README and docs: keys, links, floors, sizes and planned hours are those of the code."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

from mixar.config import Config, load_config, to_dict, value_of
from mixar.plan import make_plan, parameter_count
from tests.test_structure import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = [name for name, kind in get_type_hints(Config).items() if is_dataclass(kind)]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What makes pages as the site is built."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat(values: dict, prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested values."""
    for key, value in values.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_readme_is_a_front_door() -> None:
    assert len(read("README.md").splitlines()) <= 180


def test_every_key_has_a_row_with_a_meaning(hooks: ModuleType) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*?) \|$", hooks.key_tables(), re.M)
    assert [key for key, *_ in rows] == [*flat(to_dict(Config()))]
    assert [key for key, _, _, meaning in rows if not meaning] == []


def test_the_rows_show_what_the_config_has(hooks: ModuleType) -> None:
    rows = {key: default for key, default in re.findall(r"^\| `([\w.]+)` \| (.+?) \|", hooks.key_tables(), re.M)}
    cfg = load_config(None)
    for key, default in rows.items():
        if followed := re.fullmatch(r"that of `(.+)`", default):
            assert value_of(cfg, key) == value_of(cfg, followed[1])
        elif default == "follows":
            assert key == "model.grid" and value_of(cfg, key) == cfg.latent_grid // cfg.model.patch
        elif key != "sample.diffusion_steps":  # text that would be read as a number
            assert value_of(load_config(None, [f"{key}={default.strip('`')}"]), key) == value_of(cfg, key)


def test_configuration_is_where_the_keys_go(hooks: ModuleType) -> None:
    assert hooks.on_page_markdown(read("docs/configuration.md")).count("| `train.batch` |") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_page_names_a_key_that_is_gone(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.\w+)[=`]", page.read_text())
    assert set(named) <= {*flat(to_dict(Config()))}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_page_names_a_file_that_is_gone(page: Path) -> None:
    for path in re.findall(r"`((?:mixar|tests|configs|slurm|csrc|benchmarks|docs)/[\w./*]*)`", page.read_text()):
        assert list(ROOT.glob(path)), path


def test_layout_shows_the_floors() -> None:
    (shown,) = re.findall(r"^## Floors\n.*?^```\n(.*?)^```", read("docs/layout.md"), re.M | re.S)
    assert tuple(shown.splitlines()) == FLOORS


def test_layout_names_every_room() -> None:
    (tree,) = re.findall(r"^## Where things are\n\n```\n(.*?)^```", read("docs/layout.md"), re.M | re.S)
    for floor in FLOORS:
        for room in floor.split():
            assert re.search(rf"\b{room}(\.py|/)", tree) or room == "verbs", room


def test_sizes_of_the_configs() -> None:
    rows = re.findall(r"^\| ((?:`\w+` ?)+) \| .+? \| ([\d,]{9,}(?: · [\d,]+)*) \|$", read("docs/imagenet.md"), re.M)
    sizes: dict[str, str] = {}
    for names, totals in rows:
        sizes |= zip(re.findall(r"\w+", names), totals.split(" · "), strict=True)
    assert set(sizes) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, size in sizes.items():
        assert f"{parameter_count(load_config(name)):,}" == size, name


def test_planned_hours() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) \| ([\d,]+) \|$", read("docs/imagenet.md"), re.M)
    assert [name for name, *_ in rows] == ["mixar_b", "mixar_l", "mixar_h"]
    for name, speed, hours, gpu_hours in rows:
        engine = make_plan(load_config(name), gpus=8)["engines"]["fsdp"]
        told = engine["images_per_second"], 24 * engine["days"], 8 * 24 * engine["days"]
        assert [f"{number:,.0f}" for number in told] == [speed, hours, gpu_hours], name
    assert f"{rows[0][3]}, {rows[1][3]} and {rows[2][3]} hours of one H100" in read("README.md")


def test_make_help_names_every_target() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.+)$", read("Makefile"), re.M)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in shown.splitlines()} == set(targets.split())


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """A link that leads nowhere, a page that is not listed, or a docstring that cannot be read is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "data-md-component" in (tmp_path / "index.html").read_text()
    assert 'id="mixar.sampling.pipeline.MixARPipeline"' in (tmp_path / "reference/sampling/index.html").read_text()
    assert "<code>train.micro_batch</code>" in (tmp_path / "configuration/index.html").read_text()
