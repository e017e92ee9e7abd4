"""Flow matching, the head's second process; the first is held by tests/golden."""

import math

import numpy as np
import pytest
import torch

from mixar.config import ModelConfig
from mixar.errors import UserError
from mixar.model import SOLVERS, STOCHASTIC, Diffusion, MixAR, Process, init_weights
from mixar.model.flow import Flow
from mixar.model.head import Head

MEAN, STD = 1.5, 0.3


def test_the_velocity_of_the_path_has_no_loss_and_its_error_is_the_loss() -> None:
    x0, noise, t = torch.randn(7, 3), torch.randn(7, 3), Flow.times(torch.rand(7))
    seen = []

    def net(x_t: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, None]:
        seen.append((x_t, times))
        return noise - x0 + 0.5, None

    mse, vb = Flow().losses(net, x0, t, noise)
    torch.testing.assert_close(mse, torch.full((7,), 0.25))
    assert vb is None
    (x_t, times), s = seen[0], t[:, None] / 1000
    torch.testing.assert_close(x_t, x0 + s * (noise - x0))
    assert torch.equal(times, t)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_a_sampling_divides_its_time_evenly(steps: int) -> None:
    whole, late = Flow(str(steps)), Flow(str(steps), 499)
    torch.testing.assert_close(whole.timesteps, 1000 * torch.arange(1, steps + 1) / steps)
    torch.testing.assert_close(late.timesteps, whole.timesteps / 2)


def test_ancestral_steps_keep_the_distribution_of_a_gaussian() -> None:
    """With the velocity of a narrow Gaussian's best prediction, draws end with its mean and nearly its deviation."""
    process, generator = Flow("200"), torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, generator=generator)
    for step in reversed(range(len(process))):
        alpha, sigma = float(process.alpha[step]), float(process.sigma[step])
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        noise = torch.randn(x.shape, generator=generator)
        x, parts = process.ancestral_step(step, x, (x - x0) / sigma, None, noise, 1.0)
        torch.testing.assert_close(parts["pred_xstart"], x0, rtol=1e-4, atol=1e-4)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.05)


def test_the_last_ancestral_step_gives_the_clean_tokens_and_a_temperature_of_zero_the_mean() -> None:
    process, x, velocity = Flow("4"), torch.randn(5, 3), torch.randn(5, 3)
    done, _ = process.ancestral_step(0, x, velocity, None, None, 1.0)
    torch.testing.assert_close(done, x - 0.25 * velocity)
    cold, parts = process.ancestral_step(2, x, velocity, None, torch.randn(5, 3), 0.0)
    assert torch.equal(cold, parts["mean"])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("kind", "steps"), [(Diffusion, 1), (Diffusion, 7), (Flow, 1), (Flow, 7)])
def test_a_step_is_the_same_by_its_number_and_by_a_tensor(kind: type[Process], steps: int, solver: str) -> None:
    """The last step of the tensor's path gets zeros for the noise that it does not add."""
    process, solve = kind(str(steps)), SOLVERS[solver]
    x, prediction, v, noise, before = torch.randn(5, 6, 3)
    outputs = prediction, v if process.learns_variance else None
    for step in range(steps):
        given = torch.zeros_like(noise) if step == 0 else noise
        before = torch.zeros_like(before) if step == steps - 1 else before
        plain, clean = solve(process, step, x, outputs, before, None if step == 0 else noise, 0.9)
        found, known = solve(process, torch.tensor([step]), x, outputs, before, given, torch.tensor([0.9]))
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
        assert (known is None) == (clean is None) == (solver in STOCHASTIC)
        if step == 0:
            torch.testing.assert_close(plain, process.clean(0, x, prediction))


def test_the_numbers_of_a_step_are_those_of_its_formulas() -> None:
    """Ho et al. (2020) for a draw of x_{k-1}, at α² + σ² = 1 and on the straight path; Lu et al. (2022), eq. 4.4."""
    flow = Flow("5", 899)
    alpha, sigma = flow.alpha, flow.sigma
    for k in range(1, 5):
        c, m = flow.coefficients(k), flow.multistep(k)
        forward = alpha[k] / alpha[k - 1]
        beta = sigma[k] ** 2 - forward**2 * sigma[k - 1] ** 2
        assert c["mean_coef_x"] == pytest.approx(forward * sigma[k - 1] ** 2 / sigma[k] ** 2)
        assert c["mean_coef_x0"] == pytest.approx(alpha[k - 1] * beta / sigma[k] ** 2)
        assert c["deviation"] == pytest.approx(math.sqrt(beta) * sigma[k - 1] / sigma[k])
        lambdas = np.log(alpha / sigma)
        h = lambdas[k - 1] - lambdas[k]
        assert m["keep"] == pytest.approx(sigma[k - 1] / sigma[k])
        assert m["move"] == pytest.approx(alpha[k - 1] * (1 - math.exp(-h)))
        assert m["change"] == pytest.approx(h / (lambdas[k] - lambdas[k + 1]) / 2 if k < 4 else 0)
    assert flow.multistep(0) == {"keep": 0, "move": 1, "change": 0}, "the clean tokens"


@pytest.mark.parametrize("spec", ["ddim50", "10,5", "0", "1001"])
def test_what_does_not_divide_evenly_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"write sample\.diffusion_steps=25"):
        Flow(spec)


def test_the_head_takes_times_between_the_steps() -> None:
    torch.manual_seed(0)
    head = Head(4, 24, 2, 16, learn_variance=False)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    x, z, t = torch.randn(1200, 4), torch.randn(300, 24), torch.randint(0, 1000, (1200,))
    looked_up, v = head(x, t, z)
    assert v is None
    torch.testing.assert_close(head(x, t.float(), z)[0], looked_up, rtol=1e-4, atol=1e-4)
    assert not torch.equal(head(x, t + 0.5, z)[0], looked_up)


def test_only_a_process_that_learns_its_variance_has_an_output_for_it() -> None:
    sizes = {"encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 32, "decoder_depth": 1,
             "decoder_heads": 2, "head_depth": 2, "head_width": 16, "code_bits": 4, "classes": 3,
             "code_dim": None, "grid": 4}  # fmt: skip
    ddpm, flow = (MixAR(ModelConfig(process=kind, latent_channels=4, **sizes)) for kind in ("ddpm", "flow"))
    init_weights(flow, 0)
    assert ddpm.state_dict().keys() == flow.state_dict().keys()
    shapes = [network.state_dict()["diffloss.net.final_layer.linear.weight"].shape[0] for network in (ddpm, flow)]
    assert shapes == [8, 4]
