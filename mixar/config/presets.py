"""Ways to sample, from the reference's own to the fastest, chosen on a grid as `mixar evaluate --grid` measures it."""

from typing import Any

# of SampleConfig; what a preset leaves out stays as the export has it
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
