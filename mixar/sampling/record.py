"""The record in a folder of samples: which weights, labels, seeds and settings they were sampled with."""

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from mixar.config import SampleConfig, renamed, to_dict
from mixar.errors import UserError

RECORD = "sampling.json"
NPZ = "samples.npz"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The entries in which two records differ. The older one may lack entries that were added since."""
    return [key for key in now if key != "export" and key in before and before[key] != now[key]]


def read_record(samples: Path) -> dict[str, Any] | None:
    """The record of the samples in a folder, or in the npz of one; None where there is none.

    Raises:
        UserError: a record that `mixar sample` did not write.
    """
    folder = samples if samples.is_dir() else samples.parent
    file = folder / RECORD
    if not file.is_file() or (samples.is_file() and samples.name != NPZ):
        return None
    try:
        record = json.loads(file.read_text())
        values = record["export"], record["weights"], record["dtype"], record["labels"], record["count"]
        sampling = without_batch(complete(record["sampling"]))
        kinds = [type(value) for value in (*values, sampling["seed"])]
        if kinds != [str, dict, str, list, int, int] or {type(label) for label in values[3]} != {int}:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not what `mixar sample` writes: remove it to take the images as they are") from None
    return record | {"sampling": sampling}


def sample_names(record: dict[str, Any]) -> dict[str, int]:
    """The name of each PNG that belongs to a record, and its label."""
    first, labels = record["sampling"]["seed"], islice(cycle(record["labels"]), record["count"])
    return {f"{first + i}-{label}.png": label for i, label in enumerate(labels)}


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an older record under their present names; newer ones were at their defaults."""
    return to_dict(SampleConfig()) | renamed(settings)


def without_batch(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the batch size, which changes the speed only."""
    return {name: value for name, value in settings.items() if name != "batch"}
