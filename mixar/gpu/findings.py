"""The findings of a check, and the conversion of its errors into one."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixar.failures import in_words

PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Finding:
    """A result of a check.

    Attributes:
        name: what was checked.
        status: `ok`, `bad` or `not run`.
        text: why it is bad or was not run.
        figures: everything that was measured, as plain values.
    """

    name: str
    status: str
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, faults: list[str], figures: dict[str, Any]) -> "Finding":
        """Bad if there are faults, else ok."""
        return cls(name, "bad" if faults else "ok", "; ".join(faults), figures)


def attempt(name: str, work: Callable[[], Finding]) -> Finding:
    """The finding of `work`, or that of the error that it raises."""
    try:
        return work()
    except Exception as error:
        return failed(name, error)


def failed(name: str, error: Exception) -> Finding:
    """A bad finding with an error and its place in mixar."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
    at = f"mixar{frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].lineno}"
    return Finding(name, "bad", f"{type(error).__name__} in {at}: {' '.join(str(in_words(error)).split())[:500]}")
