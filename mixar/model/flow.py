"""Flow matching on a straight path (Lipman et al. 2023; Liu et al. 2023): the head predicts the velocity ε - x0."""

import math

import numpy as np
import torch
from torch import Tensor

from mixar.config import STEPS, even_times
from mixar.model.process import Network, Process


class Flow(Process):
    """x_s = (1 - s) x0 + s ε with s = time / 1000 in [0, 1]; the steps of sampling are evenly spaced in time."""

    learns_variance = False
    levels = math.inf

    def __init__(self, spec: str | None = None, last: int = STEPS - 1) -> None:
        sigma = np.array(even_times(str(STEPS) if spec is None else spec, last + 1))
        alpha = 1 - sigma
        timesteps = torch.tensor(STEPS * sigma, dtype=torch.float32, device="cpu")
        # q(x_{k-1} | x_k, x0); the last step goes to the clean tokens, α = 1 and σ = 0
        alpha_to, sigma_to = np.append(1, alpha[:-1]), np.append(0, sigma[:-1])
        forward = alpha / alpha_to  # α of the forward step from x_{k-1} to x_k, whose variance follows
        variance = sigma**2 - (forward * sigma_to) ** 2
        tables = {
            "sigma": sigma,
            "mean_coef_x": forward * sigma_to**2 / sigma**2,
            "mean_coef_x0": alpha_to * variance / sigma**2,
            "deviation": np.sqrt(variance) * sigma_to / sigma,
        }
        super().__init__(timesteps, alpha, sigma, tables)

    @staticmethod
    def times(u: Tensor) -> Tensor:
        return STEPS * u

    @staticmethod
    def loss_bytes(channels: int) -> int:
        return 4 * channels  # the error, kept for the gradient of its square

    def losses(self, net: Network, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, None]:
        """The squared error of the velocity (eq. 23 of Lipman et al.), mean over channels; see `Process.losses`."""
        s = (t / STEPS)[:, None]
        velocity, _ = net((1 - s) * x0 + s * noise, t)
        return (noise - x0 - velocity).square().mean(-1), None

    def clean(self, step: int | Tensor, x: Tensor, prediction: Tensor) -> Tensor:
        return x - self.coefficients(step)["sigma"] * prediction

    def ancestral_step(
        self, step: int | Tensor, x: Tensor, prediction: Tensor, v: Tensor | None, noise: Tensor | None,
        temperature: float | Tensor, /,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """A sample of q(x_{k-1} | x_k, x0) at the predicted x0; see `Process.ancestral_step`."""
        c, x0 = self.coefficients(step), self.clean(step, x, prediction)
        mean = c["mean_coef_x"] * x + c["mean_coef_x0"] * x0
        parts = {"mean": mean, "pred_xstart": x0}
        if noise is None:
            assert step == 0, "only the last step adds no noise"
            return mean, parts
        return mean + c["deviation"] * temperature * noise, parts
