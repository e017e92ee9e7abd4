"""Commands as a reader meets them, in README and docs, in --help and in what verbs say next: every one is tried."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixar.__main__ import main
from mixar.command_line import VERBS, verb_parser
from mixar.config import load_config
from mixar.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = "\n".join(path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROGRAM = r"(?:\.venv/bin/)?mixar \w|make \w|python -m \w|torchrun |deepspeed |sbatch |slurm/\w+\.sh "

# Every command of README and docs stands in one of these three. Run as printed, after `mixar demo`, with the words that
# keep it short:
RUN = {
    "mixar train CONFIG --dry-run": "",
    "mixar plan CONFIG --gpus 32 --gpu h100": "train.batch=512",  # the demo's own is too small for 32
    "mixar plan CONFIG --print run_dir": "",
    "mixar prepare CONFIG --verify": "",
    "mixar sample RUN --labels 3,7 --count 16 --steps 64 --cfg-scale 3 --seed 0 --grid": "",
    "mixar export RUN --out FOLDER": "",
    "mixar doctor CONFIG": "",
    "mixar configs mixar_l --copy DIR": "",
    "mixar doctor": "",
    "mixar evaluate runs/demo/mixar --reference digits --crop 32 --extractor runs/demo/classifier --count 2000 "
    "--batch 250 --solver dpm --order checkerboard --diffusion-start 970 --grid steps=2,4,8 diffusion_steps=4,8,16 "
    "prior_steps=4,8,12": "--count 20 --batch 20 --grid steps=2 diffusion_steps=4 prior_steps=4",
}
# Read by the verb's own parser, and its config loaded: they take ImageNet, GPUs, a cluster or hours.
PARSED = (
    ".venv/bin/mixar demo --images DIR",
    ".venv/bin/mixar demo --images DIR --minutes 15",
    ".venv/bin/mixar demo --images DIR --minutes 60",
    ".venv/bin/mixar demo --compare",
    "mixar demo",
    "mixar demo --compare",
    "mixar train CONFIG [key=value ...]",
    "mixar prepare CONFIG data.images=DIR",
    "mixar prepare CONFIG data.images=DIR --list",
    "mixar prepare CONFIG --pre-draw",
    "mixar plan CONFIG --gpus 32",
    "mixar sample RUN --count 50000 --npz --preset fast --compile",
    "mixar evaluate RUN --count 50000 --reference data/imagenet/val --crop 256 --extractor inception",
    "mixar evaluate RUN --reference data/imagenet/val --crop 256 --grid steps=8,64 cfg_scale=2,3",
    "torchrun --nproc_per_node=8 mixar/train.py configs/mixar_l.yaml",
    "deepspeed --num_gpus 8 mixar/train.py configs/mixar_l.yaml",
    "deepspeed --num_gpus 2 mixar/train.py configs/demo/mixar.yaml",  # .ci/run runs it
    "mixar doctor configs/mixar_l.yaml",  # whose weights nobody has before they fetched them
    "mixar prepare configs/mixar_l.yaml data.images=/data/imagenet/train",
    "mixar prepare configs/mixar_l.yaml --verify",
    "mixar train configs/mixar_l.yaml",
    "mixar train configs/vae_f16d32.yaml data.images=/data/world",
    "mixar train configs/tokenizer_14bit.yaml data.images=/data/world",
    "torchrun --nproc_per_node=8 mixar/train.py configs/vae_f16d32.yaml data.images=/data/world",
    "mixar prepare configs/mixar_l.yaml data.images=/data/world data.shards=data/world vae.weights=runs/vae_f16d32 "
    "tokenizer.weights=runs/tokenizer_14bit",
    "mixar evaluate runs/mixar_l --count 50000 --reference /data/imagenet/train --crop 256 --extractor inception",
    "sbatch slurm/prepare.sh data.images=/data/imagenet/train",
    "sbatch slurm/train_l.sh",
    "sbatch --nodes=4 --time=48:00:00 slurm/train_l.sh configs/ti_mix_l.yaml train.epochs=800",
    "sbatch slurm/sample.sh runs/mixar_l --count 50000 --npz",
    "sbatch slurm/evaluate.sh runs/mixar_l --reference /data/imagenet/train --crop 256",
    "torchrun -m mixar doctor",
    "mixar train configs/mixar_h.yaml --dry-run",  # tests/test_plan.py holds what this and the next two print
    "mixar plan configs/mixar_h.yaml --gpus 32",
    "mixar plan configs/mixar_h.yaml",
    "mixar plan configs/mixar_h.yaml --gpus 32 --gpu h100",
    "mixar plan configs/mixar_l_512.yaml --gpus 32",
    "mixar doctor configs/mixar_h.yaml",
    "mixar doctor CONFIG --gpu",  # tests/gpu
    "mixar doctor mixar_l --gpu",
    "mixar doctor mixar_l train.micro_batch=16 --gpu",
    "sbatch slurm/train_h.sh",
    "sbatch --nodes=8 slurm/train_h.sh configs/mixar_h.yaml",
    "slurm/pipeline.sh l data.images=/data/imagenet/train -- --reference /data/imagenet/train --crop 256",
)
# Run elsewhere.
ELSEWHERE = {
    "make demo": ".ci/run, in its short form",
    "make test": ".ci/run",
    "make bench": "tests/test_benchmarks.py",
    "make lint": ".ci/run",
    "make docs": "tests/test_docs.py",
    "make help": "tests/test_docs.py",
    "python -m tests.chaos --kills 20": ".ci/run",
    "python -m mixar.ops.build": "tests/test_package.py",
    "python -m mixar.ops.build [cpu] [cuda]": "tests/test_package.py",
}


def commands(markdown: str) -> Iterator[str]:
    """Those in code blocks, without what is told beside them, and those in backticks that say more than a verb."""
    fenced = False
    for line in re.sub(r"\\\n *", "", markdown).splitlines():
        fenced ^= line.startswith("```")
        spans = [line.removeprefix("$ ")] if fenced else [s for s in re.findall(r"`([^`]+)`", line) if s.count(" ") > 1]
        spans += [s for s in re.findall(r"`(make \w+)`", line) if not fenced]
        yield from (bare(span) for span in spans if re.match(PROGRAM, span))


def bare(line: str) -> str:
    """A line's command alone: what is told beside it is set off by spaces, and so are arguments under each other."""
    verb = re.match(r"(?:\S*mixar \w+ {1,3}(?=\S))?", line)
    assert verb is not None
    return f"{' '.join(verb[0].split())} {re.split('  +', line[verb.end() :])[0]}".strip()


def parse(command: str) -> None:
    """Let the verb's own parser read a command, and load its config.

    Raises:
        SystemExit, UserError: they cannot be read.
    """
    words = [word.strip("[]") for word in shlex.split(fill(command)) if word != "...]"]
    if words[0] == "slurm/pipeline.sh":
        split = words.index("--")
        read("train", [f"configs/mixar_{words[1]}.yaml", *words[2:split]])
        read("evaluate", ["RUN", *words[split + 1 :]])
    elif words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
        text, given = (ROOT / words[script]).read_text(), words[script + 1 :]
        default = re.search(r"set -- (configs/\S+)", text)
        called = re.search(r"-m mixar[. ](\w+)", text)
        assert called is not None
        read(called[1], [default[1], *given] if default and ".yaml" not in "".join(given[:1]) else given)
    else:
        name = next(i for i, word in enumerate(words) if re.search(r"mixar$|mixar/train\.py$", word))
        if words[name].endswith("train.py"):
            words.insert(name + 1, "train")
        read(words[name + 1], words[name + 2 :])


def read(verb: str, arguments: list[str]) -> argparse.Namespace:
    args = verb_parser(verb).parse_intermixed_args(arguments)
    if hasattr(args, "config"):
        load_config(ROOT / args.config if args.config.endswith(".yaml") else args.config, args.overrides)
    return args


def fill(command: str) -> str:
    """A command with examples in the places of its CAPITALS."""
    places = {
        "CONFIG": "demo/mixar", "RUN": "runs/demo/mixar", "FOLDER": "release", "key=value": "train.batch=64",
        "<images or statistics>": "digits",
    }  # fmt: skip
    for place, example in places.items():
        command = command.replace(place, example)
    return command


def test_every_command_is_listed() -> None:
    assert set(commands(PAGES)) == {*RUN, *PARSED, *ELSEWHERE}


@pytest.mark.parametrize("command", [*PARSED, *RUN])
def test_commands_can_be_read(command: str) -> None:
    parse(command)


def test_a_command_that_cannot_be_read_is_seen() -> None:
    for wrong in ("mixar sample RUN --cout 3", "sbatch slurm/train_l.sh train.batc=3", "mixar plan nowhere.yaml"):
        with pytest.raises((SystemExit, UserError)):
            parse(wrong)


@pytest.mark.parametrize("verb", VERBS)
def test_commands_of_the_help_can_be_read(verb: str) -> None:
    text = verb_parser(verb).description or ""
    found = re.findall(r"^ *((?:srun \S+ )?mixar .*)$", text, re.M)
    assert found
    for line in found:
        parse(re.split("  +", line)[0])


def test_commands_that_verbs_name_are_there() -> None:
    """In messages and docstrings: the verb, and its flags."""
    sources = [*(ROOT / "mixar").rglob("*.py"), *(ROOT / "slurm").iterdir()]
    text = "\n".join(path.read_text() for path in sources)
    named = re.findall(r"`mixar (\w+)([^`\n\"]*)", text)
    named += [found for found in re.findall(r"(?<!`)mixar (\w+)([^`\n\"]*)", text) if found[0] in VERBS]
    assert len(named) > 40
    for verb, rest in named:
        if verb != "VERB":
            known = verb_parser(verb)._option_string_actions
            assert [flag for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", rest) if flag not in known] == []


@pytest.fixture(scope="module")
def clone(demo: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `mixar demo` has run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("mixar", "configs", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(demo[0] / "runs", folder / "runs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_commands_run(clone: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    assert main(shlex.split(f"{fill(command)} {RUN[command]}")[1:]) == 0


@pytest.mark.slow
def test_the_programs_run(clone: Path) -> None:
    programs = set(re.findall(r"^```python\n(.*?)^```", PAGES, re.M | re.S))
    assert programs
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=clone, env=os.environ | {"PYTHONPATH": str(clone)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_what_the_demo_names_next_runs(demo: tuple[Path, str], clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = demo[1].partition("Next:\n")[2].splitlines()
    assert [" ".join(line.split()[:2]) for line in lines] == ["mixar sample", "mixar train", "tensorboard --logdir"]
    monkeypatch.chdir(clone)
    for line in lines[:2]:
        assert main(shlex.split(line)[1:]) == 0
    assert list((clone / lines[2].split()[2]).glob("*/tb/events*"))
