"""The flags that say how to sample, and the axes of a grid over them: from text to checked settings.

A mistake in a value is a `SettingError`, which `spelling` turns into what the user typed.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from mixar.config import ORDERS, PRECISIONS, PRESETS, SampleConfig, check_sample_values
from mixar.errors import SettingError, UserError, did_you_mean

Settings = dict[str, Any]  # fields of `SampleConfig`, and `preset`

MOST = 10**7  # images of one set: their labels and seeds are lists in memory
GRID = ["steps=4,8,16", "diffusion_steps=4,8,25", "prior_steps=4,8,16"]  # what --grid tries by default


def _interval(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--cfg-interval {text} is not two shares of the steps: write --cfg-interval 0.25,1") from None


FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "seed": (int, "of the first image: image i has seed + i, and depends on that alone"),
    "steps": (int, "autoregressive steps"),
    "order": (str, f"of the positions: {' or '.join(ORDERS)}"),
    "solver": (str, "of the denoising: ddpm, or dpm, which takes fewer steps"),
    "diffusion_steps": (str, "denoising steps per token: 100, ddim50, or 10,5"),
    "diffusion_steps_end": (int, "DiSA: what the denoising steps fall to over the autoregressive steps"),
    "diffusion_start": (int, "training step that denoising starts from, 999 or below"),
    "cfg_scale": (float, "scale of classifier-free guidance; 1 is none"),
    "cfg_interval": (_interval, "share of the autoregressive steps that are guided, such as 0.25,1"),
    "temperature": (float, "of the denoising noise"),
    "prior_steps": (int, "steps of the discrete prior"),
    "prior_cfg_scale": (float, "scale of the discrete prior's guidance; 0 is none"),
    "batch": (int, "images at a time; it changes the speed only"),
}
# what a grid can vary; the seed and the batch change no quality, and an interval has a comma of its own
AXES = ("preset", *(name for name in FLAGS if name not in ("seed", "batch", "cfg_interval")))


def add_flags(parser: argparse.ArgumentParser, count: str) -> None:
    """Add all flags that `request` reads; `count` says how many images are sampled without --count."""
    parser.add_argument("--labels", help="classes to sample in turn, such as 3,7,7 or 0-9 (default: all)")
    parser.add_argument("--count", type=int, help=f"images (default: {count})")
    for name, (kind, about) in FLAGS.items():
        parser.add_argument(flag(name), type=kind, help=f"{about} (default: the export's)")
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from, which the flags above change")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the faster one of the device")
    parser.add_argument("--compile", action="store_true", help="for many images on a GPU: the diffusion in CUDA graphs")


def given_flags(args: argparse.Namespace) -> list[str]:
    """The flags of `add_flags` that the user gave."""
    names = ("labels", "count", "preset", "precision", "compile", *FLAGS)
    return [flag(name) for name in names if getattr(args, name) not in (None, False)]


def flag(name: str) -> str:
    """The flag of a setting: `--name`."""
    return "--" + name.replace("_", "-")


@contextmanager
def spelling(spell: Callable[[str, Any], str]) -> Iterator[None]:
    """Report mistakes in settings in the words of the user: `spell(name, value)` in place of `sample.<name>=<value>`.

    Raises:
        UserError: in place of a `SettingError` of the block.
    """
    try:
        yield
    except SettingError as error:
        raise UserError(error.spelled(lambda key, value: spell(key.removeprefix("sample."), value))) from None


def as_flag(name: str, value: Any) -> str:
    """`--steps 4`, for `spelling`."""
    return f"{flag(name)} {','.join(map(str, value)) if isinstance(value, list) else value}"


def request(args: argparse.Namespace, count: int | None = None) -> dict[str, Any]:
    """The arguments of `SampleSet.open` that the flags name; `count` is the number of images without --count.

    Raises:
        UserError: a flag whose value no model could follow.
    """
    if args.count is not None and not 1 <= args.count <= MOST:
        raise UserError(f"--count {args.count} is out of range: write a value from 1 to {MOST}")
    settings = {name: getattr(args, name) for name in ("preset", *FLAGS) if getattr(args, name) is not None}
    with spelling(as_flag):
        _check(settings)
    return {
        "settings": settings, "labels": args.labels, "count": args.count or count, "precision": args.precision,
        "compile": args.compile,
    }  # fmt: skip


def parse_grid(texts: list[str], given: list[str]) -> list[Settings]:
    """The points of a grid: the product of its axes; of the default one, also each preset.

    Args:
        texts: one axis each, as in `steps=4,8`; without any, the default grid's.
        given: the sampling flags that stand beside the grid.

    Raises:
        UserError: an unknown axis or value, an axis given twice, or one that a flag holds fixed.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts or GRID:
        name, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"--grid {text} is not an axis: write such as steps=4,8, and name the run before --grid")
        if name not in AXES:
            hint = did_you_mean(name, AXES)
            raise UserError(f"--grid {text}: there is no axis '{name}'.{hint} Known: {', '.join(AXES)}")
        if name in axes:
            raise UserError(f"--grid has the axis {name} twice: write all of its values once, as in {name}=a,b,c")
        with spelling(lambda name, value: f"--grid {name}={value}"):
            axes[name] = list(dict.fromkeys(_parse_value(name, value) for value in values.split(",")))
    for name in axes if texts else [*axes, "preset"]:
        if (fixed := flag(name)) in given:
            instead = f"drop {fixed}" if texts else f"drop {fixed}, or name the axes, such as --grid cfg_scale=1,2,3"
            raise UserError(f"--grid varies {name} by itself: {instead}")
    points = [dict(zip(axes, values)) for values in product(*axes.values())]
    return points if texts else [*points, *({"preset": name} for name in PRESETS)]


def _parse_value(name: str, text: str) -> Any:
    """The value of a sampling flag or of `preset`, as the command line reads it. SettingError for an impossible one."""
    key = f"sample.{name}"
    if name == "preset":
        if text not in PRESETS:
            raise SettingError(f"{{}} is not known: write one of {', '.join(PRESETS)}", (key, text))
        return text
    kind, _ = FLAGS[name]
    try:
        value = kind(text)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise SettingError(f"{{}} is not {number}: write such as {{}}", (key, text), (key, 4)) from None
    _check({name: value})
    return value


def _check(settings: Settings) -> None:
    """Each setting by itself, whatever the model and the preset. SettingError for one that is out of range."""
    check_sample_values(SampleConfig(**{name: value for name, value in settings.items() if name != "preset"}))
