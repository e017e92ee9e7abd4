"""The schedules of MAR against the reference's own tables."""

import torch
from fixtures import load
from test_mar import check_tables

from mixar.config import SampleConfig
from mixar.mixing import ratio_quantile
from mixar.model import Diffusion
from mixar.sampling.autoregressive import reveal_schedule


def names(fixture, prefix: str) -> set[str]:
    found = {name[len(prefix) :].rpartition(".")[0] for name in fixture.tensors if name.startswith(prefix)}
    assert found, f"no {prefix} table in the fixture"
    return found


def test_reveal_schedule() -> None:
    fixture = load("tables")
    for combo in names(fixture, "mar."):
        length, steps = (int(part[1:]) for part in combo.split("_"))
        expected = fixture.under(f"mar.{combo}.")
        plan = reveal_schedule(length, SampleConfig(steps=steps, cfg_scale=3.0))
        assert [max(step.after, 1) for step in plan] == expected["mask_len"].tolist(), combo
        assert [step.before - step.after for step in plan] == expected["n_pred"].tolist(), combo
        scales = torch.tensor([step.cfg_scale for step in plan], dtype=torch.float64)
        torch.testing.assert_close(scales, expected["cfg_iter_for_cfg3"], rtol=1e-9, atol=0)


def test_respaced_diffusion() -> None:
    fixture = load("tables")
    for spec in names(fixture, "diffusion."):
        check_tables(Diffusion(spec), fixture.under(f"diffusion.{spec}."), 1e-9)


def test_mask_ratio_law() -> None:
    fixture = load("tables")
    for law in names(fixture, "maskratio."):
        expected = fixture.under(f"maskratio.{law}.")
        minimum = float(law.removeprefix("min"))
        ours = ratio_quantile(expected["u"], minimum, 0.25)
        torch.testing.assert_close(ours, expected["quantile"], rtol=1e-9, atol=1e-12)
        mean, std = expected["mean_std"].tolist()
        fine = ratio_quantile((torch.arange(100000, dtype=torch.float64) + 0.5) / 100000, minimum, 0.25)
        assert abs(fine.mean().item() - mean) < 1e-6 and abs(fine.std().item() - std) < 1e-6
