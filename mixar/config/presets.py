"""Presets of sampling, from the reference's settings to the fastest, chosen by `mixar evaluate --grid`."""

from typing import Any

# keys of SampleConfig; the others keep the values of the export
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {
        "steps": 64, "order": "random", "solver": "ddpm", "diffusion_steps": "100", "diffusion_steps_end": None,
        "cfg_interval": [0.0, 1.0],
    },
    "fast": {
        "steps": 8, "order": "checkerboard", "solver": "dpm", "diffusion_steps": "16", "diffusion_steps_end": None,
        "diffusion_start": 970, "cfg_interval": [0.0, 1.0], "temperature": 1.0, "prior_steps": 8,
    },
    "fastest": {
        "steps": 4, "order": "checkerboard", "solver": "dpm", "diffusion_steps": "4", "diffusion_steps_end": None,
        "diffusion_start": 970, "cfg_interval": [0.0, 1.0], "temperature": 1.0, "prior_steps": 4,
    },
}  # fmt: skip
