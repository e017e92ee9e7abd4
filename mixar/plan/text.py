"""A plan as text, with its assumptions."""

from typing import Any

from mixar.cards import CARDS, GPUS_A_NODE
from mixar.config import Config
from mixar.plan.engines import DEEPSPEED_BUCKET, DEEPSPEED_LIVE, LINK, OVERLAP, utilisation

_WIDTH = 15  # of the names' column
_PARTS = ("weights", "gradients", "adam", "ema", "gathered", "bf16_copies", "prior", "activations", "total")


def render(plan: dict[str, Any]) -> str:
    """A plan as text of several lines."""
    lines = []
    for name, value in plan.items():
        if name in ("chosen", "engines", "assumptions"):
            continue
        if name == "memory":
            parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in value.items())
            value = f"{parts} GiB in one process, without activations"
        elif name == "flops":
            parts = ", ".join(f"{part} {size / 1e12:.3f}" for part, size in value.items())
            value = f"{parts} TFLOP per image, forward and backward"
        elif name == "discriminator":
            value = f"{value:,} of the parameters, which the export leaves out"
        elif value is None:
            value = "unknown: write data.count=<images>, or prepare the shards first"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"  {name:<{_WIDTH}} {value}")
    if "engines" in plan:
        lines += ["", *_table(plan), "", *_conclusions(plan), "", "assumptions, none of them measured here"]
        lines += [f"  - {line}" for line in plan["assumptions"]]
    return "plan\n" + "\n".join(lines)


def _table(plan: dict[str, Any]) -> list[str]:
    """A table with one row per engine."""
    rows = [["engine", *(part.replace("_", " ") for part in _PARTS), "in node", "across", "planned speed"]]
    for name, engine in plan["engines"].items():
        parts = [engine["memory"][part] for part in _PARTS]
        moved = [engine["moved"][where] for where in ("within", "across")]
        rows.append([name, *(f"{size / 1e9:.2f}" for size in parts + moved), _speed(plan, engine)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    heading = "  GB per rank at the peak of each part; GB sent per rank and step, within the node and across nodes"
    return [heading, *("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)]


def _speed(plan: dict[str, Any], engine: dict[str, Any]) -> str:
    if not engine["fits"]:
        return f"does not fit: {engine['memory']['total'] / 1e9:.0f} of {CARDS[plan['card']].memory / 1e9:.0f} GB"
    days = "" if engine["days"] is None else f", {engine['days']:.2f} days ({24 * engine['days']:.0f} h)"
    return f"{engine['images_per_second']:,.0f} images/s{days}"


def _conclusions(plan: dict[str, Any]) -> list[str]:
    """The engine of the run, and changes with which the others would fit."""
    chosen, engines = plan["chosen"], plan["engines"]
    if chosen["torchrun"] == chosen["deepspeed"]:
        lines = [f"  this run takes {chosen['torchrun']}"]
    else:
        lines = [f"  torchrun and srun take {chosen['torchrun']}, the deepspeed launcher takes {chosen['deepspeed']}"]
    fitting = [name for name, engine in engines.items() if engine["fits"]]
    for name, engine in engines.items():
        if not engine["fits"]:
            fixes = engine["fixes"] + [f"engine.name={other}" for other in fitting[:1]]
            lines.append(f"  {name} would fit with {' or '.join(fixes) or 'more memory per card only'}")
    return lines


def assumptions(card_name: str, cfg: Config) -> list[str]:
    """The assumptions of a plan with GPUs."""
    card, precision = CARDS[card_name], cfg.train.precision
    peak = card.bf16 if precision == "bf16" else card.fp32
    shares = {engine: f"{utilisation(cfg, engine):.0%}" for engine in ("ddp", "zero3")}
    share = shares["ddp"] if len(set(shares.values())) == 1 else f"{shares['ddp']} (zero3 {shares['zero3']})"
    return [
        f"{card_name}: {card.memory / 1e9:.0f} GB, {peak / 1e12:.0f} TFLOP/s dense in {precision}, "
        f"{card.nvlink / 1e9:.0f} GB/s to its node and {card.network / 1e9:.0f} GB/s to other nodes in one direction, "
        f"as its maker specifies for nodes of {GPUS_A_NODE}",
        f"the computation reaches {share} of that peak, as `python benchmarks/count.py` counts for the nearest of the "
        "paper's models at its micro-batch on an H100; published MAR-L runs reach 9-17 %",
        f"links reach {LINK:.0%} of their bandwidth; {OVERLAP:.0%} of the communication overlaps with the computation; "
        "latency is not counted, which favours engines that gather over many nodes",
        "weights, gradients, Adam's moments and EMA are float32; the peaks of the parts are summed, though they do not "
        "coincide; CUDA's context, NCCL and fragmentation take the memory that a card has beyond its nominal GB",
        "activations are those that autograd keeps in eager mode, without the attention weights",
        f"DeepSpeed's own defaults: a bucket of {DEEPSPEED_BUCKET:,} gradients, up to {DEEPSPEED_LIVE:,} weights "
        "gathered at a time; its stages 1 and 2 hold a second copy of the weights that they update",
        "loading, optimizer step, checkpoints and previews take no time; the prior runs only in the steps in which "
        "TI-Mix needs it",
    ]
