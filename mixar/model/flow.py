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
        self.sigma = np.array(even_times(str(STEPS) if spec is None else spec, last + 1))
        self.alpha = 1 - self.sigma
        self.timesteps = torch.tensor(STEPS * self.sigma, dtype=torch.float32, device="cpu")

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

    def clean(self, step: int, x: Tensor, prediction: Tensor) -> Tensor:
        return x - float(self.sigma[step]) * prediction

    def ancestral_step(
        self, step: int, x: Tensor, prediction: Tensor, v: Tensor | None, noise: Tensor | None, temperature: float, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A sample of q(x_{k-1} | x_k, x0) at the predicted x0; see `Process.ancestral_step`."""
        x0 = self.clean(step, x, prediction)
        if step == 0:
            return x0, {"mean": x0, "pred_xstart": x0}
        assert noise is not None
        (alpha_to, alpha), (sigma_to, sigma) = self.alpha[step - 1 : step + 1], self.sigma[step - 1 : step + 1]
        forward = alpha / alpha_to  # α of the forward step from x_{k-1} to x_k, whose variance follows
        variance = sigma**2 - (forward * sigma_to) ** 2
        mean = float(forward * sigma_to**2 / sigma**2) * x + float(alpha_to * variance / sigma**2) * x0
        deviation = float(math.sqrt(variance) * sigma_to / sigma)
        return mean + deviation * temperature * noise, {"mean": mean, "pred_xstart": x0}
