"""The checks one after the other: what ends one of them leaves the others, and what the command says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mixar import gpu
from mixar.__main__ import main
from mixar.config import Config
from mixar.dist import Place
from mixar.gpu import CHECKS, Finding, examine, row
from mixar.gpu.draws import random_numbers
from mixar.verbs import doctor
from tests import WITH_CARDS
from tests.gpu.faults import crashing, good, hanging, raising
from tests.home import FORKS

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_check_that_ends_badly_ends_alone(cfg: Config) -> None:
    checks = {"raising": raising, "crashing": crashing, "random numbers": random_numbers, "good": good}
    found = list(examine(cfg, CPU, checks))
    assert [(finding.name, finding.status) for finding in found] == [
        ("raising: first", "ok"), ("raising", "bad"), ("crashing: first", "ok"), ("crashing", "bad"),
        ("random numbers", "ok"), ("good", "ok"),
    ]  # fmt: skip
    assert "illegal memory access" in found[1].text
    assert found[3].text == "the process of the check ended with status -6"
    assert found[5].figures["pid"] != os.getpid()


@pytest.mark.slow
def test_when_the_time_is_over_the_rest_is_not_run(cfg: Config) -> None:
    begun = time.monotonic()
    list(examine(cfg, CPU, {"good": good}))
    limit = 3 * (time.monotonic() - begun)  # enough for a check to begin on this machine
    found = list(examine(cfg, CPU, {"hanging": hanging, "good": good}, limit))
    assert [(finding.name, finding.status) for finding in found] == [
        ("hanging: first", "ok"), ("hanging", "bad"), ("good", "not run")
    ]  # fmt: skip
    assert found[2].text == f"the {limit:g} seconds of all checks are over"


def test_a_row_shows_reason_and_figures() -> None:
    finding = Finding("profile: eager", "bad", "too slow", {"step, ms": 1234.567, "longest": [1], "kernels": 9})
    assert row(finding) == f"bad      {finding.name:<45} too slow; step, ms 1235; kernels 9"


def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*given: str) -> str:
        assert main(["doctor", *given, "--gpu"]) == 2
        return capsys.readouterr().err

    assert "no config was given: write mixar doctor mixar_l --gpu" in told()
    assert "a config with task=vae was given" in told("demo/vae")
    assert "--gpu needs a GPU, and torch" in told("mixar_l") and "sees none" in told("mixar_l")
    monkeypatch.setattr(doctor.dist, "find", lambda: Place(0, 2, torch.device("cuda", 0), 0, 2, "torchrun"))
    assert "2 were started: write mixar doctor CONFIG --gpu" in told("mixar_l")


@pytest.mark.parametrize("status", ["ok", "not run", "bad"])
def test_the_command_prints_a_table_and_keeps_the_figures(
    status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding("one", "ok", "", {"loss": 0.5}), Finding("two", status, "a reason")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.dist, "find", lambda: Place(0, 1, torch.device("cuda", 0)))
    monkeypatch.setattr(gpu, "examine", lambda cfg, device: iter(found))
    assert main(["doctor", "mixar_l", "--gpu"]) == (2 if status == "bad" else 0)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [*map(row, found), "", "all figures are in gpu.json"]
    assert ("1 of 2 checks are bad" in printed.err) is (status == "bad")
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [finding["status"] for finding in kept["findings"]] == ["ok", status]
    assert kept["findings"][0]["figures"] == {"loss": 0.5} and kept["config"]["model"]["encoder_width"] == 1024
    assert {"cards", "driver", "cuda", "operators", "environment"} < set(kept)


def seen_by(command: list[str], **env: str) -> str:
    """The cards that a program sees, by the variable that names them."""
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("sees"))


def say(pipe) -> None:
    pipe.send(os.environ["CUDA_VISIBLE_DEVICES"])


def test_tests_and_what_they_start_see_no_card(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os\nprint('sees', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    assert seen_by([sys.executable, str(program)], CUDA_VISIBLE_DEVICES="0,1") == "sees "  # as Slurm sets it
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    assert seen_by([deepspeed, "--num_gpus=1", str(program)]) == "sees "
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=say, args=(theirs,))
    process.start()
    assert ours.recv() == ""
    process.join()


@pytest.fixture(scope="module")
def on_cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What `mixar doctor --gpu` finds on this machine's GPUs, by check."""
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    if int(subprocess.run(count, env=WITH_CARDS, capture_output=True, text=True, check=True).stdout) == 0:
        pytest.skip("no GPU")
    folder = tmp_path_factory.mktemp("gpu")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [WITH_CARDS.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mixar", "doctor", "mixar_l", "--gpu"]
    subprocess.run(command, cwd=folder, env=WITH_CARDS | {"PYTHONPATH": path})
    found: dict[str, list[dict]] = {name: [] for name in CHECKS}
    for finding in json.loads((folder / "gpu.json").read_text())["findings"]:
        found[finding["name"].partition(":")[0]].append(finding)
    return found


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("check", CHECKS)
def test_on_this_machine_s_cards(on_cards: dict[str, list[dict]], check: str) -> None:
    assert on_cards[check] and [finding for finding in on_cards[check] if finding["status"] == "bad"] == []
    if all(finding["status"] == "not run" for finding in on_cards[check]):
        pytest.skip(on_cards[check][0]["text"])
