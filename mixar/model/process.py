"""The interface of the head's process between clean tokens and noise, and the solvers that reverse it.

`mixar.model.diffusion` is the paper's (DDPM), `mixar.model.flow` is flow matching. Another one needs a class, a line in
`PROCESSES` of `mixar.model.mixar`, and its respacing in `mixar.config.respacing`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from torch import Tensor

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(x_t [R, C], times [R]) to the prediction [R, C] and the variance fraction [R, C], None if it is not learned."""


class Process(ABC):
    """x_t = α_t x0 + σ_t ε, the network's target, and K steps from noise to clean tokens.

    It is built without arguments for training, and with a respacing for sampling.

    Args:
        spec: the number of sampling steps, as in `sample.diffusion_steps`.
        last: `sample.diffusion_start`, the step of the 1000 that sampling starts from.

    Attributes:
        learns_variance: whether the network also predicts a variance fraction.
        levels: number of distinct training times, infinite if they are continuous.
        timesteps: [K], the time of each step, ascending, on the scale 0..1000 that the head embeds.
        alpha, sigma: float64 [K], α and σ at these times.
    """

    learns_variance: ClassVar[bool]
    levels: ClassVar[float]
    timesteps: Tensor
    alpha: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    @staticmethod
    @abstractmethod
    def times(u: Tensor) -> Tensor:
        """Training times on the scale 0..1000, from uniform random numbers in [0, 1)."""

    @staticmethod
    @abstractmethod
    def loss_bytes(channels: int) -> int:
        """Bytes per row that autograd keeps for `losses`, without those of the network."""

    @abstractmethod
    def losses(self, net: Network, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss per row, as terms to add up.

        Args:
            x0: clean tokens [R, C].
            t: [R], as returned by `times`.
            noise: ε [R, C].

        Returns:
            mse [R], the mean over channels of the prediction's squared error; the variational term [R] that trains the
            variance, None if it is not learned.
        """

    @abstractmethod
    def clean(self, step: int, x: Tensor, prediction: Tensor) -> Tensor:
        """x0 [R, C] from x_k [R, C] and the network's prediction [R, C]."""

    @abstractmethod
    def ancestral_step(
        self, step: int, x: Tensor, prediction: Tensor, v: Tensor | None, noise: Tensor | None, temperature: float, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A sample of x_{k-1} given x_k; the temperature scales its noise.

        Args:
            step: k.
            x, prediction, v, noise: [R, C]; step 0 adds no noise, so noise may be None there.

        Returns:
            the sample [R, C], and the values that it was computed from, by name.
        """


Solver = Callable[
    [Process, int, Tensor, tuple[Tensor, Tensor | None], Tensor | None, Callable[[], Tensor], float],
    tuple[Tensor, Tensor | None],
]
"""A step of sampling.

(process, k, x_k [R, C], the network's outputs, the clean tokens predicted in step k+1, a function that draws noise
[R, C], temperature) to x_{k-1} and, if the next step needs them, the clean tokens predicted in this step.
"""


def ancestral(
    process: Process, step: int, x: Tensor, outputs: tuple[Tensor, Tensor | None], before: Tensor | None,
    noise: Callable[[], Tensor], temperature: float,
) -> tuple[Tensor, None]:  # fmt: skip
    """A `Solver` that samples x_{k-1} by the process's own ancestral step."""
    return process.ancestral_step(step, x, *outputs, noise() if step > 0 else None, temperature)[0], None


def dpm(
    process: Process, step: int, x: Tensor, outputs: tuple[Tensor, Tensor | None], before: Tensor | None,
    noise: Callable[[], Tensor], temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al. 2022), a deterministic `Solver`; its first step is of first order."""
    x0 = process.clean(step, x, outputs[0])
    if step == 0:
        return x0, x0
    with np.errstate(divide="ignore"):  # at pure noise α is 0: the first step uses x0 alone
        log_snr = np.log(process.alpha / process.sigma)  # half of it, λ
    h = log_snr[step - 1] - log_snr[step]
    towards = x0
    if before is not None:
        ratio = float(h / (log_snr[step] - log_snr[step + 1]))
        towards = x0 + 0.5 * ratio * (x0 - before)
    keep = float(process.sigma[step - 1] / process.sigma[step])
    move = float(-process.alpha[step - 1] * np.expm1(-h))
    return keep * x + move * towards, x0


SOLVERS: dict[str, Solver] = {"ddpm": ancestral, "dpm": dpm}
