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
from mixar.gpu.findings import PACKAGE, Finding, attempt
from mixar.gpu.synthetic import changed, few_blocks
from mixar.gpu.worker import take_steps

RANKS = 2
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
        raise RuntimeError(f"the ranks ended with status {done.returncode}: {done.stderr[-2000:]}")
    return judge(name, json.loads(Path(files[-1]).read_text()), reference)


def judge(name: str, found: dict[str, Any], reference: dict[str, Any]) -> Finding:
    """The largest relative differences over the steps, and that of the final weights."""
    figures = {"weights": found["distance"]}
    for what in ("loss", "gradient norm"):
        pairs = zip(found[what], reference[what], strict=True)
        figures[what] = max(abs(mine - other) / abs(other) for mine, other in pairs)
    faults = [f"the {what} differ by {figures[what]:.3g} from one process" for what, limit in CLOSE.items()
              if not figures[what] <= limit]  # fmt: skip
    return Finding.of(name, faults, {f"{what}, relative difference": value for what, value in figures.items()})
