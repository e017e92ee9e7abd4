"""mixar as `pip install` leaves it, away from its clone; with its extras and without."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

from mixar.__main__ import EXTRAS
from mixar.command_line import VERBS
from mixar.demo.classifier import train_classifier
from mixar.evaluation.classifier import save_classifier

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how OpenMP's threads wait
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Run = Callable[..., subprocess.CompletedProcess]

# what a program finds where the packages of the extras are not installed
WITHOUT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {tuple(EXTRAS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_all_that_belongs_to_it_is_in_the_wheel(installed: Path) -> None:
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "mixar").rglob("*.py")}
    kept = {f"mixar/{path.relative_to(ROOT)}" for name in ("configs", "csrc") for path in (ROOT / name).rglob("*.*")}
    assert len(kept) > 20 and all((installed / path).is_file() for path in code | kept | {"mixar/py.typed"})
    (about,) = installed.glob("mixar-*.dist-info")
    assert {path.name for path in (about / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
    assert "License-Expression: Apache-2.0\n" in (about / "METADATA").read_text()


@pytest.fixture(scope="module")
def outside(installed: Path, demo: tuple[Path, str]) -> Run:
    """`outside("-m", "mixar", ...)` runs python on the installed package in a folder that is no clone, after a demo."""
    folder = demo[0]

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess:
        place = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(folder / "cache")}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=os.environ | place | env, capture_output=True, text=True)

    where = run("-c", "import mixar; print(mixar.__file__)")
    assert where.stdout.strip() == str(installed / "mixar" / "__init__.py")
    return run


def test_configs_have_names(outside: Run) -> None:
    listed = outside("-m", "mixar", "configs").stdout
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert re.search(rf"(?m)^{path.relative_to(ROOT / 'configs').with_suffix('')} +\w", listed)
    assert outside("-m", "mixar", "configs", "mixar_l").stdout == (ROOT / "configs/mixar_l.yaml").read_text()
    copying = ("-m", "mixar", "configs", "demo/mixar", "--copy", "mine")
    assert outside(*copying).returncode == 0
    again = outside(*copying)
    assert again.returncode == 2 and "mine/demo/mixar.yaml exists and is never replaced" in again.stderr
    by_file, by_name = (outside("-m", "mixar", "plan", given) for given in ("mine/demo/mixar.yaml", "demo/mixar"))
    assert by_file.returncode == 0 and by_file.stdout == by_name.stdout
    unknown = outside("-m", "mixar", "plan", "configs/mixar-l.yaml")
    assert unknown.returncode == 2 and "Did you mean 'mixar_l'?" in unknown.stderr and "demo/vae" in unknown.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the operators with")
def test_the_operators_compile(outside: Run) -> None:
    built = outside("-m", "mixar.ops.build", "cpu")
    assert built.returncode == 0 and "cpu operators compiled for this processor" in built.stdout


def test_the_demo_is_sampled_from_and_the_doctor_content(outside: Run, demo: tuple[Path, str]) -> None:
    assert (demo[0] / "runs" / "demo" / "report.png").exists() and "MixAR" in demo[1]
    sample = outside("-m", "mixar", "sample", "runs/demo/mixar", "--count", "4", "--steps", "2", "--grid")
    assert sample.returncode == 0 and "4 images: runs/demo/mixar/samples/" in sample.stdout, sample.stderr
    doctor = outside("-m", "mixar", "doctor", "demo/mixar")
    assert doctor.returncode == 0, doctor.stdout


@pytest.fixture
def bare(tmp_path: Path) -> Run:
    """`bare("sample", ...)` runs a verb where none of the extras' packages is installed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mixar", *map(str, arguments)]
        path = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
        return subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)

    return run


def test_samples_and_scores_need_no_extra(bare: Run, release: Path, tmp_path: Path) -> None:
    images, labels = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8), torch.arange(30) % 3
    save_classifier(tmp_path / "classifier", *train_classifier(images, labels, 3, steps=2))
    drawn = bare("sample", release, "--count", 30, "--out", "samples")
    assert drawn.returncode == 0, drawn.stderr
    score = ("--reference", "samples", "--extractor", "classifier", "--count", 20)
    scored = bare("evaluate", release, *score)
    assert scored.returncode == 0, scored.stderr
    grid = bare("evaluate", release, *score, "--grid", "steps=2")
    assert grid.returncode == 2 and "matplotlib is missing: write pip install 'mixar[plot]'" in grid.stderr
    assert bare("doctor").returncode == 0


@pytest.mark.parametrize("verb", ["train", "prepare", "demo", "export"])
def test_a_verb_names_the_extra_that_it_needs(bare: Run, verb: str) -> None:
    done = bare(verb, *(["demo/vae"] if verb != "demo" else []))
    assert done.returncode == 2
    assert re.fullmatch(rf"mixar {verb}: \w+ is missing: write pip install 'mixar\[train\]'\n", done.stderr)


def test_extras_hold_what_they_are_named_for() -> None:
    extras = PROJECT["optional-dependencies"]
    packages = packages_distributions()
    for module, extra in EXTRAS.items():
        (package,) = packages[module]
        assert any(text.startswith(package) for text in extras[extra])
        assert not any(text.startswith(package) for text in PROJECT["dependencies"])
    assert "mixar[train]" in extras["demo"] and "mixar[demo,docs]" in extras["dev"]  # so that [dev] is everything


def openmp(code: str, **env: str) -> str:
    """The policy that a fresh process ends with, after `code`."""
    given = {name: value for name, value in os.environ.items() if name not in WAITING} | env
    command = [sys.executable, "-c", f"{code}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout.strip()


def test_waiting_threads_sleep_unless_somebody_else_decided() -> None:
    assert openmp("import mixar") == "2000"
    assert openmp("import mixar", GOMP_SPINCOUNT="7") == "7"
    assert openmp("import mixar", OMP_WAIT_POLICY="ACTIVE") == "None"
    assert openmp("import torch, mixar") == "None"


@pytest.mark.parametrize("command", ["-m mixar plan demo/mixar"])
def test_openmp_heeds_it(command: str) -> None:
    asked = {name: value for name, value in os.environ.items() if name not in WAITING}
    asked |= {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=asked, capture_output=True, text=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch brings another OpenMP than GNU's, which does not tell how long it spins")
    assert done.returncode == 0 and "GOMP_SPINCOUNT = '2000'" in done.stderr


@pytest.mark.parametrize(("arguments", "status"), [("plan demo/mixar", 141), ("plan demo/none", 2)])
def test_a_reader_that_has_gone_is_no_traceback(arguments: str, status: int) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "mixar", *arguments.split()], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == status and "Error" not in done.stderr


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_no_torch(verb: str) -> None:
    code = f"import sys; from mixar.__main__ import main; main({[*verb.split(), '--help']})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert "usage: mixar" in done.stdout and done.stdout.endswith("False\n")
