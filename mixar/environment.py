"""The software and hardware of a measurement or a run, to be stored with its results."""

import platform
import socket
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

PACKAGES = (
    "mixar", "torch", "torchvision", "deepspeed", "mosaicml-streaming", "numpy", "omegaconf", "torch-fidelity",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, machine and command line of this process."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "python": platform.python_version(),
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """The version of an installed package; None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
