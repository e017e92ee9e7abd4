"""The whole method on small images, on a CPU, in minutes: codecs, shards, prior, MixAR, samples, scores, a picture."""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixar import dist, resources
from mixar.codecs import from_bytes, load_tokenizer, load_vae, posterior, to_bytes
from mixar.config import GUIDANCES, Config, load_config, to_dict
from mixar.data.images import ImageSet, ImageSource, open_images, split, training_images
from mixar.data.shards import prepare
from mixar.environment import environment
from mixar.errors import UserError
from mixar.evaluation import evaluate
from mixar.evaluation.classifier import save_classifier, train_classifier
from mixar.evaluation.extractors import Extractor, make_extractor
from mixar.evaluation.scores import Features, accumulate
from mixar.files import replacing, write_json
from mixar.model import guidance_of
from mixar.plan import parameter_count
from mixar.sampling import MixARPipeline
from mixar.train import train
from mixar.verbs.process import check_writable
from mixar.verbs.report import draw_report
from mixar.weights import describe_export, newest_export

CONFIGS = resources.CONFIGS / "demo"
DIGITS = 4500  # training images of the built-in set, which the configs' epochs are meant for
COLUMNS = 20  # of the picture
MADE_OF = "made_of.json"  # what the folder's models are of
NETWORKS = ("vae", "tokenizer", "prior", "mixar")  # each with a config
RECIPE = ("model", "mask", "ti_mix", "optim", "train", "sample")  # what else shapes them


@dataclass
class Length:
    """How long the demo is: the share of each config's epochs, and the number of samples scored."""

    codecs: float = 1.0
    prior: float = 1.0
    mixar: float = 1.0
    classifier_steps: int = 400
    images: int = 100_000  # that are used of the set at most
    samples: int = 2000


SHORT = Length(codecs=0.05, prior=0.05, mixar=0.03, classifier_steps=60, images=1000, samples=100)


@dataclass
class Demo:
    """A demo's folder and what it has done there."""

    out: Path
    images: str
    length: Length
    stages: dict[str, float] = field(default_factory=dict)  # seconds of each finished stage

    def __post_init__(self) -> None:
        check_writable(self.out / MADE_OF)
        self.device = dist.find().device
        self.precision = dist.fast_precision(self.device)
        whole = open_images(
            load_config(CONFIGS / "vae.yaml", [f"data.images={self.images}", "data.classes=100000"]).data
        )
        if len(whole) < 40:
            raise UserError(f"{self.images} holds {len(whole)} images: give at least 40, and hundreds to see something")
        self.classes = len(whole.classes)
        self.count = min(len(whole) - min(500, len(whole) // 10), self.length.images)
        self.held_out = len(whole) - self.count
        self._claim(digest(whole))
        self.stages = _read(self.out / "stages.json")

    def _claim(self, images: str) -> None:
        """Write down what the demo in this folder is made of, unless that is something else.

        Raises:
            UserError: it is.
        """
        configs = {name: to_dict(load_config(CONFIGS / f"{name}.yaml")) for name in NETWORKS}
        recipes = {name: {part: config[part] for part in (*NETWORKS[:3], *RECIPE)} for name, config in configs.items()}
        now = json.loads(json.dumps({"images": images, "length": asdict(self.length), "configs": recipes}))
        before = _read(self.out / MADE_OF)
        if other := [key for key in now if key in before and _differs(before[key], now[key])]:
            raise UserError(
                f"{self.out} holds a demo of other {', '.join(other)}: name another folder with --out, or remove it"
            )
        write_json(self.out / MADE_OF, now)

    def config(self, name: str, share: float, *overrides: str) -> Config:
        """`configs/demo/<name>.yaml` for this folder and set, of the same number of images seen whatever its size."""
        stretch = share * DIGITS / self.count
        base = load_config(CONFIGS / f"{name}.yaml")
        epochs = {
            "train.epochs": base.train.epochs,
            "train.checkpoint_every": base.train.checkpoint_every,
            "optim.warmup_epochs": base.optim.warmup_epochs,
            "ti_mix.start_epoch": base.ti_mix.start_epoch,
            "ti_mix.duration_epochs": base.ti_mix.duration_epochs,
        }
        exports = {f"{kind}.weights": self.newest_export(kind) for kind in ("vae", "tokenizer", "prior")}
        return load_config(CONFIGS / f"{name}.yaml", [
            f"run_dir={self.out / name}", f"data.images={self.images}", f"data.shards={self.out / 'shards'}",
            f"data.classes={self.classes}", f"data.held_out={self.held_out}", f"train.precision={self.precision}",
            *(f"{key}={value * stretch}" for key, value in epochs.items()),
            *(f"{key}={path}" for key, path in exports.items() if path is not None and not key.startswith(name)),
            *overrides,
        ])  # fmt: skip

    def newest_export(self, kind: str) -> Path | None:
        """The export that the stage `kind` ended with."""
        return newest_export(self.out / kind)

    def export_of(self, kind: str) -> Path:
        """The same. UserError where it was removed since."""
        export = self.newest_export(kind)
        if export is None:
            raise UserError(f"{self.out / kind} has no export any more: remove {self.out} and make the demo again")
        return export

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Time a stage; gives False where an earlier start finished it."""
        if name in self.stages:
            yield False
            return
        print(f"\n== {name}", flush=True)
        begun = time.monotonic()
        yield True
        self.stages[name] = round(time.monotonic() - begun, 1)
        write_json(self.out / "stages.json", self.stages)

    def train(self, name: str, share: float) -> None:
        with self.stage(name) as todo:
            if todo:
                train(self.config(name, share))

    def prepare_all(self) -> None:
        """Everything that MixAR stands on: classifier, codecs, shards, prior."""
        with self.stage("classifier") as todo:
            if todo and not self.extractor_path.exists():
                images, labels = _pixels(self.image_set("train"), self.config("vae", 1.0).data.image_size)
                network, accuracy = train_classifier(images, labels, self.classes, steps=self.length.classifier_steps)
                save_classifier(self.extractor_path, network, accuracy)
        self.train("vae", self.length.codecs)
        self.train("tokenizer", self.length.codecs)
        with self.stage("shards") as todo:
            if todo:
                cfg = self.config("prior", self.length.prior)
                prepare(cfg, training_images(cfg.data), load_vae(cfg.vae), load_tokenizer(cfg.tokenizer), self.device)
        self.train("prior", self.length.prior)

    @property
    def extractor_path(self) -> Path:
        return self.out / "classifier"

    def image_set(self, part: str) -> ImageSet:
        """The `train` or `held` images."""
        cfg = self.config("vae", 1.0).data
        return split(open_images(cfg), cfg.held_out, seed=0)[0 if part == "train" else 1]

    def pipeline(self, name: str = "mixar") -> MixARPipeline:
        return MixARPipeline.from_pretrained(self.export_of(name), self.device, self.precision)

    def scoring(self) -> tuple[Extractor, Features]:
        """The classifier as feature extractor, and the training images seen through it."""
        extractor = make_extractor(str(self.extractor_path), self.device)
        images, _ = _pixels(self.image_set("train"), self.config("vae", 1.0).data.image_size)
        return extractor, accumulate(images.split(256), extractor)

    def draw_list(self, count: int) -> tuple[Tensor, Tensor]:
        """Labels in turn and seeds 0, 1, ...: int64 [count] each."""
        seeds = torch.arange(count)
        return seeds % self.classes, seeds


def run_demo(demo: Demo) -> dict[str, Any]:
    """All stages to `report.json` and `report.png`; returns the report."""
    demo.prepare_all()
    demo.train("mixar", demo.length.mixar)
    pipeline = demo.pipeline().with_settings(batch=250)
    held_set = demo.image_set("held")
    spread = torch.linspace(0, len(held_set) - 1, min(500, len(held_set))).long()
    held, held_labels = _pixels(held_set.subset(spread.tolist()), pipeline.image_size)
    labels, seeds = demo.draw_list(demo.length.samples)
    with demo.stage("samples") as todo:
        file = demo.out / "samples.pt"
        if todo:
            codes = pipeline.sample_codes(labels, seeds, progress="prior")
            images = pipeline(labels, seeds, codes, progress="MixAR")
            with replacing(file) as aside:
                torch.save({"prior": pipeline.decode_codes(codes), "mixar": images}, aside)
        samples = torch.load(file)
    with demo.stage("scores"):
        extractor, reference = demo.scoring()
        reconstructed = reconstruct(pipeline, held)
        rfid = {
            k: evaluate(v.split(256), held.split(256), extractor, reconstructions=True)
            for k, v in reconstructed.items()
        }
        scores = {k: evaluate(v.split(256), reference, extractor, labels=labels) for k, v in samples.items()}
        places = [_nth(held_labels, int(label), i // demo.classes) for i, label in enumerate(labels[:COLUMNS])]
        rows = {
            "real": held[places],
            "VAE reconstruction": reconstructed["vae"][places],
            "tokenizer reconstruction": reconstructed["tokenizer"][places],
            "discrete prior": samples["prior"][:COLUMNS],
            "MixAR, same tokens": samples["mixar"][:COLUMNS],
        }
        draw_report(demo.out / "report.png", rows)
    report = {
        "seconds": demo.stages | {"total": round(sum(demo.stages.values()), 1)},
        "rfid": {name: score["distance"]["value"] for name, score in rfid.items()},
        "fid": {name: score["distance"]["value"] for name, score in scores.items()},
        # none where the set is of one class
        "accuracy": {name: score["accuracy"] for name, score in scores.items() if "accuracy" in score},
        "images_per_second": images_per_second(demo),
        "measured_with": {
            "what": "Frechet distance in the features of the demo's own classifier, no Inception FID",
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
    """uint8 images [B, 3, H, W] through each codec and back."""
    assert pipeline.tokenizer is not None
    vae, tokenizer = pipeline.vae, pipeline.tokenizer
    batches = [from_bytes(batch.to(pipeline.device)) for batch in images.split(100)]
    by_vae = [to_bytes(vae.decode(posterior(vae.encode(batch))[0])).cpu() for batch in batches]
    by_tokenizer = [to_bytes(tokenizer.decode(tokenizer.encode(batch))).cpu() for batch in batches]
    return {"vae": torch.cat(by_vae), "tokenizer": torch.cat(by_tokenizer)}


def images_per_second(demo: Demo) -> dict[str, float]:
    """Training speed of each network over its whole stage, and of sampling, prior and MixAR together."""
    rates = {"sampling": demo.length.samples / max(demo.stages["samples"], 0.1)}
    for name in NETWORKS:
        rates[name] = describe_export(demo.export_of(name))["images"] / max(demo.stages[name], 0.1)
    return {name: round(rate, 1) for name, rate in rates.items()}


def compare(demo: Demo) -> list[dict[str, Any]]:
    """Train each guidance on the same shards, seeds and number of images; the rows of the paper's Tables 1 and 2."""
    demo.prepare_all()
    extractor, reference = demo.scoring()
    rows = []
    for guidance in GUIDANCES:
        name = f"compare-{guidance}"
        cfg = demo.config(
            "mixar",
            demo.length.mixar / 2,
            f"model.guidance={guidance}",
            "ti_mix.enabled=false",
            f"run_dir={demo.out / name}",
        )
        with demo.stage(name) as todo:
            if todo:
                train(cfg)
        pipeline = demo.pipeline(name).with_settings(batch=250)
        labels, seeds = demo.draw_list(demo.length.samples // 2)
        # the prior is the same for all: its time is left out
        codes = None if guidance == "none" else pipeline.sample_codes(labels, seeds)
        begun = time.monotonic()
        images = pipeline(labels, seeds, codes, progress=guidance)
        elapsed = time.monotonic() - begun
        score = evaluate(images.split(256), reference, extractor, labels=labels)
        how = guidance_of(cfg.model)
        tokens = cfg.model.class_tokens + cfg.model.tokens + how.prefix + how.memory_tokens
        rows.append({
            "guidance": guidance, "parameters": parameter_count(cfg), "tokens": tokens,
            "seconds_a_step": median_step(demo.out / name, cfg.train.batch), "seconds_an_image": elapsed / len(labels),
            "fid": score["distance"]["value"], "accuracy": score.get("accuracy"),
        })  # fmt: skip
    write_json(demo.out / "compare.json", {"rows": rows, "extractor": extractor.label, "environment": environment()})
    return rows


def median_step(run: Path, batch: int) -> float:
    """Seconds a training step, the median over the logged intervals: one disturbed interval does not move it."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rates = torch.tensor([json.loads(line)["images_per_second"] for line in lines])
    return batch / rates.median().item()


def run(args: argparse.Namespace) -> None:
    length = SHORT if args.short else Length()
    out = args.out or Path(
        "runs", ("demo" if args.images == "digits" else f"demo-{Path(args.images).name}") + "-short" * args.short
    )
    demo = Demo(out, args.images, length)
    if args.compare:
        _print_table(compare(demo))
        return
    report = run_demo(demo)
    fid, rfid = report["fid"], report["rfid"]
    accuracy = {name: f"{share:13.1%}" for name, share in report["accuracy"].items()}
    print(f"""
{"":24}{"distance":>10}{"as labelled" if accuracy else "":>13}
{"discrete prior":24}{fid["prior"]:10.2f}{accuracy.get("prior", "")}
{"MixAR":24}{fid["mixar"]:10.2f}{accuracy.get("mixar", "")}
{"reconstruction by VAE":24}{rfid["vae"]:10.2f}
{"... by the tokenizer":24}{rfid["tokenizer"]:10.2f}
(Frechet distances in the features of a small {report["measured_with"]["features"]}; no Inception FID)

{out / "report.png"}   {out / "report.json"}   {report["seconds"]["total"]:.0f} s in all
Go on:
  mixar sample {out / "mixar"} --labels 0-{demo.classes - 1} --grid
  mixar train demo/mixar --dry-run
  tensorboard --logdir {out}""")


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'guidance':10}{'parameters':>12}{'tokens':>8}{'s/step':>9}{'s/image':>9}{'distance':>10}")
    for row in rows:
        print(f"{row['guidance']:10}{row['parameters']:12,}{row['tokens']:8}{row['seconds_a_step']:9.3f}"
              f"{row['seconds_an_image']:9.4f}{row['fid']:10.2f}")  # fmt: skip


def digest(images: ImageSet) -> str:
    """SHA-256 of a set's labels and the content of its images, whatever their names are.

    Raises:
        UserError: an image that cannot be read.
    """
    total = hashlib.sha256(json.dumps(images.labels).encode())
    for item in images.items:
        try:
            content = item.tobytes() if isinstance(item, np.ndarray) else item.read_bytes()
        except OSError as error:
            raise UserError(f"image {item} cannot be read ({error.strerror}): replace it or take it out") from None
        total.update(len(content).to_bytes(8) + content)
    return total.hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """What a demo wrote down; nothing where it has not yet."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is not what the demo wrote: remove {file.parent} and make the demo again")
    return found


def _differs(before: Any, now: Any) -> bool:
    """Whether two records differ in what both tell, but for where weights lie."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_differs(before[key], now[key]) for key in now if key in before and key != "weights")
    return bool(before != now)


def _pixels(images: ImageSet, size: int) -> tuple[Tensor, Tensor]:
    """All images cropped, uint8 [n, 3, size, size], and their labels [n]."""
    source = ImageSource(images, size)
    return torch.stack([source[i][0] for i in range(len(source))]), torch.tensor(images.labels)


def _nth(labels: Tensor, label: int, n: int) -> int:
    """The place of the n-th image of `label`, of the last one there is, or of any image where the class has none."""
    places = (labels == label).nonzero()[:, 0]
    return int(places[min(n, len(places) - 1)]) if len(places) else n
