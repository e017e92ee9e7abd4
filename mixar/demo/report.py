"""The demo's report: samples and reconstructions with their scores, and a picture of them."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mixar.codecs import from_bytes, posterior, to_bytes
from mixar.demo.picture import draw_rows
from mixar.demo.stages import NETWORKS, Demo, pixels
from mixar.environment import environment
from mixar.evaluation import evaluate
from mixar.files import replacing, write_json
from mixar.sampling import MixARPipeline
from mixar.weights import describe_export

COLUMNS = 20  # of the picture


def run_demo(demo: Demo) -> dict[str, Any]:
    """Run all stages, write `report.json` and `report.png`, and return the report."""
    demo.prepare_all()
    demo.train("mixar")
    pipeline = demo.pipeline().with_settings(batch=250)
    held_set = demo.image_set("held")
    spread = torch.linspace(0, len(held_set) - 1, min(500, len(held_set))).long()
    held, held_labels = pixels(held_set.subset(spread.tolist()), pipeline.image_size)
    file = demo.out / "samples.pt"
    with demo.stage("samples") as todo:
        if todo:
            labels, seeds = demo.labels_and_seeds(demo.samples(pipeline))
            codes = pipeline.sample_codes(labels, seeds, progress="prior")
            images = pipeline(labels, seeds, codes, progress="MixAR")
            with replacing(file) as aside:
                torch.save({"prior": pipeline.decode_codes(codes), "mixar": images}, aside)
    samples = torch.load(file)
    labels, _ = demo.labels_and_seeds(len(samples["mixar"]))
    with demo.stage("scores"):
        extractor, reference = demo.scoring()
        reconstructed = reconstruct(pipeline, held)
        rfid = {
            k: evaluate(v.split(256), held.split(256), extractor, reconstructions=True)
            for k, v in reconstructed.items()
        }
        scores = {k: evaluate(v.split(256), reference, extractor, labels=labels) for k, v in samples.items()}
        shown = [_nth(held_labels, int(label), i // demo.classes) for i, label in enumerate(labels[:COLUMNS])]
        rows = {
            "real": held[shown],
            "VAE reconstruction": reconstructed["vae"][shown],
            "tokenizer reconstruction": reconstructed["tokenizer"][shown],
            "discrete prior": samples["prior"][:COLUMNS],
            "MixAR, same tokens": samples["mixar"][:COLUMNS],
        }
        draw_rows(demo.out / "report.png", rows)
    report = {
        "images": asdict(demo.survey) | {"used": demo.count, "classes": demo.classes},
        "seconds": demo.stages | {"total": round(sum(demo.stages.values()), 1)},
        "rfid": {name: score["distance"]["value"] for name, score in rfid.items()},
        "psnr": {name: psnr(images, held) for name, images in reconstructed.items()},
        "fid": {name: score["distance"]["value"] for name, score in scores.items()},
        # empty where the set has one class
        "accuracy": {name: score["accuracy"] for name, score in scores.items() if "accuracy" in score},
        "chosen": demo.chosen,
        "images_per_second": images_per_second(demo, len(labels)),
        "measured_with": {
            "what": "Frechet distance in the features of the demo's own classifier, not an Inception FID",
            "name": scores["mixar"]["distance"]["name"], "extractor": extractor.label,
            "features": extractor.description, "samples": len(labels),
            "reference": "the training images", "rfid_on": f"{len(held)} held-out images", "precision": demo.precision,
        },
        "environment": environment(),
    }  # fmt: skip
    write_json(demo.out / "report.json", report)
    return report


@torch.no_grad()
def reconstruct(pipeline: MixARPipeline, images: Tensor) -> dict[str, Tensor]:
    """The reconstructions of images uint8 [B, 3, H, W] by each codec, in the same form."""
    assert pipeline.tokenizer is not None
    vae, tokenizer = pipeline.vae, pipeline.tokenizer
    batches = [from_bytes(batch.to(pipeline.device)) for batch in images.split(100)]
    by_vae = [to_bytes(vae.decode(posterior(vae.encode(batch))[0])).cpu() for batch in batches]
    by_tokenizer = [to_bytes(tokenizer.decode(tokenizer.encode(batch))).cpu() for batch in batches]
    return {"vae": torch.cat(by_vae), "tokenizer": torch.cat(by_tokenizer)}


def psnr(images: Tensor, originals: Tensor) -> float:
    """The mean over images of their peak signal-to-noise ratio in dB; both uint8 [n, 3, H, W]."""
    errors = (images.double() - originals.double()).square().mean((1, 2, 3)).clamp_min(1e-2)
    return (10 * (255**2 / errors).log10()).mean().item()


def images_per_second(demo: Demo, samples: int) -> dict[str, float]:
    """Training speed of each network over its whole stage, and sampling speed of prior and MixAR together."""
    rates = {"sampling": samples / max(demo.stages["samples"], 0.1)}
    for name in NETWORKS:
        rates[name] = describe_export(demo.export_of(name))["images"] / max(demo.stages[name], 0.1)
    return {name: round(rate, 1) for name, rate in rates.items()}


def _nth(labels: Tensor, label: int, n: int) -> int:
    """The index of the n-th image of `label`, or of the last one; of any image where the class has none."""
    rows = (labels == label).nonzero()[:, 0]
    return int(rows[min(n, len(rows) - 1)]) if len(rows) else n
