"""Respacing: the times of training that are kept in sampling with fewer steps."""

from collections.abc import Callable
from typing import Any

from mixar.errors import SettingError

STEPS = 1000  # of the diffusion's training


def respaced_steps(spec: str, steps: int = STEPS) -> list[int]:
    """The training steps that a respacing keeps, ascending.

    Args:
        spec: "K" for K evenly spaced steps, "a,b,c" for these counts in equal sections of the schedule, "ddimK" for
            the integer stride that gives K steps.

    Raises:
        SettingError: the spec is not one of these or needs more steps than there are.
    """
    try:
        if spec.startswith("ddim"):
            count = int(spec[4:])
            stride = next(s for s in range(1, steps) if len(range(0, steps, s)) == count)
            return list(range(0, steps, stride))
        sections = [int(part) for part in spec.split(",")]
        if min(sections) < 1 or len(sections) > steps:
            raise ValueError
    except (ValueError, StopIteration):
        raise SettingError(
            f"{{}} is not a respacing of {steps} steps: write a count such as 100, sections such as 10,5, or ddim50",
            ("sample.diffusion_steps", spec),
        ) from None
    kept: list[int] = []
    start = 0
    for i, count in enumerate(sections):
        size = steps // len(sections) + (i < steps % len(sections))
        if size < count:
            shorter = steps < STEPS
            raise SettingError(
                f"{{}}: a section of {size} steps cannot hold {count}; write {size} or fewer" + ", or {}" * shorter,
                ("sample.diffusion_steps", spec), ("sample.diffusion_start", STEPS - 1),
            )  # fmt: skip
        spacing = (size - 1) / (count - 1) if count > 1 else 1.0
        offset = 0.0  # accumulated as in the reference, since the rounding below depends on it
        for _ in range(count):
            kept.append(start + round(offset))
            offset += spacing
        start += size
    return sorted(set(kept))


def even_times(spec: str, steps: int = STEPS) -> list[float]:
    """The times of K steps of flow matching, ascending: `steps` / 1000 of the whole, divided evenly, without 0.

    Args:
        spec: "K", the number of steps.

    Raises:
        SettingError: the spec is not a count.
    """
    if not spec.isdecimal() or not 1 <= int(spec) <= STEPS:
        raise SettingError(
            f"{{}} is not a count from 1 to {STEPS}, and model.process=flow divides its time evenly: write {{}}",
            ("sample.diffusion_steps", spec), ("sample.diffusion_steps", 25),
        )  # fmt: skip
    return [(k + 1) / int(spec) * steps / STEPS for k in range(int(spec))]


RESPACINGS: dict[str, Callable[[str, int], list[Any]]] = {"ddpm": respaced_steps, "flow": even_times}
"""The reading of `sample.diffusion_steps` by each head process (`model.process`)."""
