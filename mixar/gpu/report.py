"""Findings as rows of a table, and the description of the cards that gpu.json begins with."""

import shutil
import subprocess
from typing import Any

import torch

from mixar.environment import environment
from mixar.gpu.findings import Finding
from mixar.ops.build import status

WIDTH = 45  # of a name


def row(finding: Finding) -> str:
    """A line of the table: status, name, reason, figures; lists stay in gpu.json."""
    figures = [f"{name} {_short(value)}" for name, value in finding.figures.items() if not isinstance(value, list)]
    return f"{finding.status:<8} {finding.name:<{WIDTH}} {'; '.join([finding.text] * bool(finding.text) + figures)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe() -> dict[str, Any]:
    """The cards, the driver and the versions, as plain values."""
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cards": [{"name": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
                  for card in cards],
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "operators": status("cuda")[1],
        "environment": environment(),
    }  # fmt: skip


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.partition("\n")[0] or None
