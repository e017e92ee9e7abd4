"""The four guidances side by side, on the same shards, seeds and number of images."""

import time
from pathlib import Path
from typing import Any

import torch

from mixar.config import GUIDANCES
from mixar.demo.stages import Demo
from mixar.environment import environment
from mixar.evaluation import evaluate
from mixar.files import write_json
from mixar.metrics import read_metrics
from mixar.model import guidance_of
from mixar.plan import parameter_count
from mixar.train import train


def compare(demo: Demo) -> list[dict[str, Any]]:
    """Train and score each guidance; returns rows as in the paper's Tables 1 and 2, also written to `compare.json`."""
    demo.prepare_all()
    extractor, reference = demo.scoring()
    share = demo.share("mixar") / (2 if demo.minutes is None else len(GUIDANCES))
    rows = []
    for guidance in GUIDANCES:
        name = f"compare-{guidance}"
        cfg = demo.config(
            "mixar",
            share,
            f"model.guidance={guidance}",
            "ti_mix.enabled=false",
            f"run_dir={demo.out / name}",
        )
        with demo.stage(name) as todo:
            if todo:
                train(cfg)
        pipeline = demo.pipeline(name).with_settings(batch=250)
        labels, seeds = demo.labels_and_seeds(demo.length.samples // 2)
        # the prior is the same for all, so its time does not count
        codes = None if guidance == "none" else pipeline.sample_codes(labels, seeds)
        begun = time.monotonic()
        images = pipeline(labels, seeds, codes, progress=guidance)
        elapsed = time.monotonic() - begun
        score = evaluate(images.split(256), reference, extractor, labels=labels)
        how = guidance_of(cfg.model)
        tokens = cfg.model.class_tokens + cfg.model.tokens + how.prefix + how.memory_tokens
        rows.append({
            "guidance": guidance, "parameters": parameter_count(cfg), "tokens": tokens,
            "seconds_per_step": median_step(demo.out / name, cfg.train.batch),
            "seconds_per_image": elapsed / len(labels), "fid": score["distance"]["value"],
            "accuracy": score.get("accuracy"),
        })  # fmt: skip
    write_json(demo.out / "compare.json", {"rows": rows, "extractor": extractor.label, "environment": environment()})
    return rows


def median_step(run: Path, batch: int) -> float:
    """Seconds per training step, the median over the logged intervals: one disturbed interval does not change it."""
    rates = torch.tensor([record["speed/images_per_second"] for record in read_metrics(run)])
    return batch / rates.median().item()
