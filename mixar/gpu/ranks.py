"""Each engine on two cards against one process."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mixar.config import ENGINES, Config, images_per_pass, to_yaml
from mixar.dist import Place
from mixar.gpu.findings import PACKAGE, Finding, attempt
from mixar.gpu.synthetic import batch_of, changed, engine_of, few_blocks

RANKS, STEPS = 2, 3
SECONDS = 120  # for one engine, of which most is the start
CLOSE = {"loss": 1e-5, "gradient norm": 1e-3, "weights": 1e-4}  # relative


def engines(cfg: Config, device: torch.device, names: tuple[str, ...] = ENGINES) -> Iterator[Finding]:
    """Three steps of each engine on two ranks against one process: in float32, without dropout."""
    if device.type == "cuda" and torch.cuda.device_count() < RANKS:
        yield Finding("engines", "not run", f"it takes {RANKS} cards, and there is one")
        return
    images = images_per_pass(cfg, ranks=1)
    cfg = changed(
        few_blocks(cfg), model={"dropout": 0.0, "attention": "auto"}, optim={"warmup_epochs": 0.0},
        train={"precision": "fp32", "batch": RANKS * images, "micro_batch": images}, engine={"compile": False},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        cfg.run_dir = folder
        expected = Path(folder, "one.pt")
        reference = take_steps(changed(cfg, engine={"name": "ddp"}), device, expected)
        for engine in names:
            name = f"engines: {engine}"
            if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                yield Finding(name, "not run", "DeepSpeed is not installed: write pip install 'mixar[train]'")
            else:
                yield attempt(name, partial(_compare, name, changed(cfg, engine={"name": engine}), expected, reference))


def _compare(name: str, cfg: Config, expected: Path, reference: dict[str, Any]) -> Finding:
    folder = Path(cfg.run_dir)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    files = [str(folder / "config.yaml"), str(expected), str(folder / f"{cfg.engine.name}.json")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(PACKAGE).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*launcher, "-m", "mixar.gpu.worker", *files], env=env, capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        said = done.stderr.splitlines()[-200:]
        return Finding(name, "bad", f"the ranks ended with status {done.returncode}", {"output": said})
    return judge(name, json.loads(Path(files[-1]).read_text()), reference)


def take_steps(cfg: Config, device: torch.device, file: Path) -> dict[str, Any]:
    """The steps in this process alone: losses and gradient norms; `file` gets the weights."""
    figures, weights = steps_of(cfg, Place(0, 1, device))
    torch.save(weights, file)
    return figures


def steps_of(cfg: Config, place: Place) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The same global batches for any number of ranks; a collective. The weights are complete on rank 0."""
    engine = engine_of(cfg, place)
    images = images_per_pass(cfg, place.world)
    passes = cfg.train.batch // images  # over all ranks
    figures: dict[str, Any] = {"loss": [], "gradient norm": []}
    for step in range(STEPS):
        numbers = range(step * passes + place.rank, (step + 1) * passes, place.world)
        info = engine.step([batch_of(cfg, images, number, place.device) for number in numbers], 0.0)
        figures["loss"].append(info.loss.item())
        figures["gradient norm"].append(info.grad_norm.item())
    return figures, engine.full_weights("live")


def judge(name: str, found: dict[str, Any], reference: dict[str, Any]) -> Finding:
    """The largest relative differences over the steps, and that of the final weights."""
    figures = {"weights": found["distance"]}
    for what in ("loss", "gradient norm"):
        pairs = zip(found[what], reference[what], strict=True)
        figures[what] = max(abs(mine - other) / abs(other) for mine, other in pairs)
    faults = [f"the {what} differ by {figures[what]:.3g} from one process" for what, limit in CLOSE.items()
              if not figures[what] <= limit]  # fmt: skip
    return Finding.of(name, faults, {f"{what}, relative difference": value for what, value in figures.items()})
