"""Memory, traffic and FLOP per rank and step with each engine. Nothing here has been measured on a GPU."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mixar.cards import GPUS_A_NODE, Card
from mixar.config import ENGINES, Config, images_per_pass
from mixar.errors import UserError
from mixar.model import MixAR
from mixar.plan.activations import activation_bytes
from mixar.plan.work import Tokens, matrices

# share of the card's peak without and with `engine.compile`, by the backbone's width: what benchmarks/count.py makes of
# mixar_b, mixar_l and mixar_h at their micro-batches
UTILISATION = {768: (0.27, 0.38), 1024: (0.33, 0.44), 1280: (0.34, 0.44)}
OVERLAP = 0.7  # share of the communication that can overlap with the computation
LINK = 0.8  # share of a link's specified bandwidth
DEEPSPEED_BUCKET = 500_000_000  # gradient values per bucket: DeepSpeed's default of reduce_bucket_size
DEEPSPEED_LIVE = 1_000_000_000  # weight values gathered at a time: its default of stage3_max_live_parameters


def utilisation(cfg: Config, engine: str) -> float:
    """The share of the card's peak that a run is planned with: that of the counted model of the nearest width."""
    nearest = min(UTILISATION, key=lambda width: abs(width - cfg.model.encoder_width))
    return UTILISATION[nearest][cfg.engine.compiles(True, engine == "zero3")]


@dataclass(frozen=True)
class Sizes:
    """The number of values in each part of the trained model."""

    parameters: int
    blocks: int  # in the units that FSDP shards: backbone blocks and the head's residual blocks
    largest: int  # the largest of them
    matrices: int  # those that autocast copies to bf16

    @property
    def root(self) -> int:
        return self.parameters - self.blocks

    @classmethod
    def of(cls, model: MixAR) -> "Sizes":
        """The sizes of `model`, which may be on the meta device."""
        sizes = [sum(p.numel() for p in unit.parameters()) for units in model.blocks().values() for unit in units]
        copied = sum(matrices(model).values())
        return cls(sum(p.numel() for p in model.parameters()), sum(sizes), max(sizes), copied)


@dataclass(frozen=True)
class Layout:
    """A run on `gpus` ranks, in full nodes of eight if there is more than one node."""

    cfg: Config
    gpus: int
    sizes: Sizes
    tokens: Tokens
    frozen: int  # values of the prior, 0 if the step does not run it

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / GPUS_A_NODE)

    @property
    def micro(self) -> int:
        """Images per rank and pass."""
        return self.tokens.images

    @property
    def passes(self) -> int:
        """Micro-batches per step."""
        return self.cfg.train.batch // (self.gpus * self.micro)

    def engine(self, launcher: str) -> str:
        """The engine of a run started by a launcher, torchrun or deepspeed."""
        if self.cfg.engine.name is not None or self.gpus == 1:
            return self.cfg.engine.name or "ddp"
        if launcher == "deepspeed":
            return "zero3"
        return "fsdp" if self.nodes == 1 else "hsdp"

    def memory(self, engine: str) -> dict[str, int]:
        """Peak bytes per rank by part, and their sum, which is more than is ever held at once."""
        s, whole = self.sizes, self.sizes.parameters
        part = math.ceil(whole / (self.gpus // self.nodes if engine == "hsdp" else self.gpus))
        gathered = 0  # bytes
        if engine == "ddp":
            weights = gradients = states = whole
        elif engine in ("fsdp", "hsdp"):
            weights = states = part
            # accumulated gradients are complete until the last pass; otherwise only those of the current block are
            gradients = whole if self.passes > 1 else part + s.largest
            # all blocks, or the current one and the next
            gathered = 4 * (s.root + (s.blocks if engine == "hsdp" else min(2 * s.largest, s.blocks)))
        else:
            # stages 1 and 2 update a copy of their part of the weights, even if these are float32
            weights = part if engine == "zero3" else whole + part
            gradients = (whole if engine == "zero1" else part) + DEEPSPEED_BUCKET
            states = part
            gathered = 4 * min(whole, DEEPSPEED_LIVE) if engine == "zero3" else 0
        kept = activation_bytes(self.cfg.model, self.tokens, self.cfg.train.precision, self.cfg.engine.recompute)
        memory = {
            "weights": 4 * weights,
            "gradients": 4 * gradients,
            "adam": 8 * states,
            "ema": 4 * states,
            "gathered": gathered,
            "bf16_copies": 2 * s.matrices * (self.cfg.train.precision == "bf16"),
            "prior": 4 * self.frozen,
            "activations": round(self.micro * sum(kept.values())),
        }
        return memory | {"total": sum(memory.values())}

    def moved(self, engine: str) -> dict[str, float]:
        """Bytes that a rank sends per step, within its node and to other nodes.

        In a ring of n, an all-gather or a reduce-scatter of S bytes sends S (n-1)/n per rank, an all-reduce twice that.
        A ring over several nodes has one link out of each node, so its traffic is divided among the GPUs of the node.
        """
        s, k = self.sizes, self.passes
        local = self.gpus // self.nodes
        whole = 4.0 * s.parameters
        blocks, root = 4 * s.blocks, 4 * s.root
        if engine == "hsdp":  # one gather per pass, one reduce-scatter; all-reduce of the parts between the nodes
            within = (local - 1) / local * (k * (blocks + root) + whole)
            return {"within": within, "across": 2 * (self.nodes - 1) / self.nodes * whole / local}
        sent = {
            "ddp": 2 * whole,  # all-reduce
            "fsdp": k * (2 * blocks + root) + whole,  # gathers forward, and of blocks also backward; reduce-scatter
            "zero1": 2 * whole,  # reduce-scatter of the gradients, gather of the updated weights
            "zero2": (k + 1) * whole,  # the same, with one reduce-scatter per pass
            "zero3": 3 * k * whole,  # gathers forward and backward and one reduce-scatter per pass
        }[engine] * (self.gpus - 1) / self.gpus  # fmt: skip
        across = sent / local if self.nodes > 1 else 0.0
        return {"within": sent - across, "across": across}

    def seconds(self, engine: str, moved: dict[str, float], flops: float, card: Card) -> float:
        """Seconds per step: the computation at `utilisation`, and the communication that does not overlap with it.

        Args:
            flops: FLOP executed per image.
        """
        peak = card.bf16 if self.cfg.train.precision == "bf16" else card.fp32
        work = self.passes * self.micro * flops / (peak * utilisation(self.cfg, engine))
        talk = moved["within"] / (card.nvlink * LINK) + moved["across"] / (card.network * LINK)
        return work + talk - min(OVERLAP * talk, work)

    def fixes(self, engine: str, memory: float) -> list[str]:
        """Overrides of the config with which the engine needs at most `memory` bytes, and less than it does now."""
        memory = self._below(engine, memory)
        group = self.cfg.mask.group if self.cfg.mask.ratio_scope == "image" else 1
        smaller = [m for m in range(self.micro - 1, 0, -1) if self.micro % m == 0 and m % group == 0]
        passes = {m: replace(self, tokens=replace(self.tokens, images=m)) for m in smaller}
        small = [f"train.micro_batch={m}" for m, run in passes.items() if run._total(engine) <= memory]
        recomputing = {
            parts: replace(self, cfg=replace(self.cfg, engine=replace(self.cfg.engine, recompute=parts)))
            for parts in ("head", "backbone", "all")
        }
        again = [f"engine.recompute={parts}" for parts, run in recomputing.items() if run._total(engine) <= memory]
        return small[:1] + again[:1]

    def others(self, engine: str, memory: float) -> list[str]:
        """Overrides of the config to the engines that need at most `memory` bytes, and less than this one."""
        memory = self._below(engine, memory)
        return [f"engine.name={other}" for other in ENGINES if self._total(other) <= memory]

    def _below(self, engine: str, memory: float) -> float:
        return min(memory, self._total(engine) - 1)

    def _total(self, engine: str) -> int:
        return self.memory(engine)["total"]


def images_a_rank(cfg: Config, gpus: int) -> int:
    """The micro-batch of a run on `gpus` GPUs.

    Raises:
        UserError: the GPUs do not fill complete nodes, or the batch does not divide over them.
    """
    if gpus < 1 or (gpus > GPUS_A_NODE and gpus % GPUS_A_NODE):
        nodes = max(1, round(gpus / GPUS_A_NODE))
        raise UserError(f"--gpus {gpus} does not fill nodes of {GPUS_A_NODE}: write --gpus {nodes * GPUS_A_NODE}")
    return images_per_pass(cfg, gpus)


def engine_plans(layout: Layout, card: Card, flops: float, steps: int | None) -> dict[str, dict[str, Any]]:
    """Memory, bytes sent, speed and duration with each engine.

    Args:
        flops: FLOP executed per image.
        steps: number of steps of the whole run.
    """
    plans: dict[str, dict[str, Any]] = {}
    for engine in ENGINES:
        plan = plans[engine] = {"memory": layout.memory(engine), "moved": layout.moved(engine)}
        if plan["memory"]["total"] > card.memory:
            plan |= {"fits": False, "fixes": layout.fixes(engine, card.memory)}
            continue
        seconds = layout.seconds(engine, plan["moved"], flops, card)
        plan |= {"fits": True, "step_seconds": seconds, "images_per_second": layout.cfg.train.batch / seconds}
        plan["days"] = None if steps is None else steps * seconds / 86400
    return plans
