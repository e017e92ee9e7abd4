"""MaskBit's schedules; each array's name holds its sizes."""

import re

import fixtures
import pytest
import torch

from mixar.prior.sampling import guidance_weights, mask_counts

TABLES = fixtures.load("maskbit_tables").under("maskbit.")
COUNTS = r"(?P<schedule>\w+)\.T(?P<total>\d+)_S(?P<steps>\d+)\.n_masked_after"
WEIGHTS = r"guidance_(?P<schedule>\w+)\.g(?P<scale>[\d.]+)_p(?P<power>[\d.]+)_S(?P<steps>\d+)"


@pytest.mark.parametrize("name", TABLES)
def test_table(name):
    if counts := re.fullmatch(COUNTS, name):
        ours = mask_counts(int(counts["total"]), int(counts["steps"]), counts["schedule"])
        assert ours == TABLES[name].tolist()
    elif weights := re.fullmatch(WEIGHTS, name):
        scale, power = float(weights["scale"]), float(weights["power"])
        ours = guidance_weights(scale, int(weights["steps"]), weights["schedule"], power)
        fixtures.assert_close(torch.tensor(ours, dtype=torch.float64), TABLES[name], 1e-6, name)
    else:
        pytest.fail(f"a table of unknown name: {name}")
