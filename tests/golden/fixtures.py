"""Reads the golden fixtures: tensors that the public reference code computed at tiny sizes.

A fixture is a safetensors file: `sd.<key>` the state dict, `in.<name>` inputs, `out.<name>` outputs, and the JSON
configuration in its metadata. `MIXAR_GOLDEN_DIR` names another folder of fixtures of the same form.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(os.environ.get("MIXAR_GOLDEN_DIR") or Path(__file__).parent / "data")


@dataclass
class Fixture:
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix`, without it."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}


def load(name: str) -> Fixture:
    """The fixture `<name>.safetensors`."""
    with safe_open(str(FOLDER / f"{name}.safetensors"), "pt") as file:
        return Fixture(
            config=json.loads((file.metadata() or {}).get("config", "{}")),
            tensors={key: file.get_tensor(key) for key in file.keys()},  # noqa: SIM118 (no mapping)
        )


def assert_close(ours: Tensor, reference: Tensor, tolerance: float, name: str) -> None:
    """|ours - reference| stays below `tolerance` times the largest magnitude of the reference."""
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)}, reference {tuple(reference.shape)}"
    scale = reference.abs().max().clamp_min(1e-12)
    error = ((ours.to(reference.dtype) - reference).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest reference value, allowed {tolerance:.0e}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
