"""The interface of the head's process between clean tokens and noise, and the solvers that reverse it.

`mixar.model.diffusion` is the paper's (DDPM), `mixar.model.flow` is flow matching. Another one needs a class, a line in
`PROCESSES` of `mixar.model.mixar`, and its respacing in `mixar.config.respacing`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mixar.config import STEPS

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(x_t [R, C], times [R]) to the prediction [R, C] and the variance fraction [R, C], None if it is not learned."""


class Coefficients:
    """What steps of sampling compute with.

    Args:
        tables: float64 [K] each, by name.
    """

    def __init__(self, tables: Mapping[str, np.ndarray]) -> None:
        self.names, self._tables = tuple(tables), tables
        columns = np.stack(list(tables.values()), -1)
        # as many rows for any K, so that one compiled step serves all; on the CPU, also on the meta device
        self._stacked = torch.zeros(STEPS, len(tables), device="cpu")
        self._stacked[: len(columns)] = torch.tensor(columns, dtype=torch.float32, device="cpu")

    def to(self, device: torch.device) -> None:
        """Move what tensors are gathered from."""
        self._stacked = self._stacked.to(device)

    def __call__(self, step: int | Tensor) -> dict[str, Any]:
        """By name: numbers for a single step, without a copy; float32 [R, 1] for steps int64 [R], on their device."""
        if isinstance(step, int):
            return {name: float(table[step]) for name, table in self._tables.items()}
        if self._stacked.device != step.device:
            self.to(step.device)
        return dict(zip(self.names, self._stacked[step].unsqueeze(-2).unbind(-1)))


class Process(ABC):
    """x_t = α_t x0 + σ_t ε, the network's target, and K steps from noise to clean tokens.

    A process is built without arguments for training; for sampling with `spec`, the number of steps as in
    `sample.diffusion_steps`, and `last`, the step of the 1000 that sampling starts from (`sample.diffusion_start`).

    Args:
        timesteps: [K], the time of each step, ascending, on the scale 0..1000 that the head embeds.
        alpha, sigma: float64 [K], α and σ at these times.
        tables: float64 [K] each, by name: what `clean` and `ancestral_step` read.

    Attributes:
        learns_variance: whether the network also predicts a variance fraction.
        levels: number of distinct training times, infinite if they are continuous.
        coefficients: those of the tables.
        multistep: those of DPM-Solver++.
    """

    learns_variance: ClassVar[bool]
    levels: ClassVar[float]

    def __init__(
        self, timesteps: Tensor, alpha: np.ndarray, sigma: np.ndarray, tables: Mapping[str, np.ndarray]
    ) -> None:
        self.timesteps, self.alpha, self.sigma = timesteps, alpha, sigma
        self.coefficients, self.multistep = Coefficients(tables), Coefficients(_multistep(alpha, sigma))

    def to(self, device: torch.device) -> "Process":
        """Move what a compiled step reads."""
        self.timesteps = self.timesteps.to(device)
        self.coefficients.to(device)
        self.multistep.to(device)
        return self

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
    def clean(self, step: int | Tensor, x: Tensor, prediction: Tensor) -> Tensor:
        """x0 [R, C] from x_k [R, C] and the network's prediction [R, C]; k as in `ancestral_step`."""

    @abstractmethod
    def ancestral_step(
        self, step: int | Tensor, x: Tensor, prediction: Tensor, v: Tensor | None, noise: Tensor | None,
        temperature: float | Tensor, /,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """A sample of x_{k-1} given x_k; the temperature scales its noise.

        Args:
            step: k, a number for all rows; or int64 [R] or [1], so that a compiled step does not depend on it.
            x, prediction, v, noise: [R, C]; step 0 adds no noise, so noise may be None there.
            temperature: a number, or [1].

        Returns:
            the sample [R, C], and the values that it was computed from, by name.
        """


def _multistep(alpha: np.ndarray, sigma: np.ndarray) -> dict[str, np.ndarray]:
    """The tables of DPM-Solver++(2M): of x_k, of the clean tokens, and of their change since the step before.

    The last step goes to the clean tokens, α = 1 and σ = 0.
    """
    with np.errstate(divide="ignore"):  # at pure noise α is 0: the step after it is of first order
        log_snr = np.log(alpha / sigma)  # half of it, λ
    h = np.append(np.inf, log_snr[:-1]) - log_snr
    change = np.zeros_like(h)  # none in the first step, which has no step before, nor in the last
    change[1:-1] = 0.5 * h[1:-1] / h[2:]
    keep, move = np.append(0, sigma[:-1]) / sigma, -np.append(1, alpha[:-1]) * np.expm1(-h)
    return {"keep": keep, "move": move, "change": change}


Solver = Callable[
    [Process, int | Tensor, Tensor, tuple[Tensor, Tensor | None], Tensor | None, Tensor | None, float | Tensor],
    tuple[Tensor, Tensor | None],
]
"""A step of sampling.

(process, k, x_k [R, C], the network's outputs, the clean tokens predicted in step k+1, noise [R, C], temperature) to
x_{k-1} and, if the next step needs them, the clean tokens predicted in this step. k, noise and temperature are as in
`Process.ancestral_step`; zeros stand for the clean tokens before the first step. A solver in `STOCHASTIC` gets no clean
tokens, another one no noise.
"""


def ancestral(
    process: Process, step: int | Tensor, x: Tensor, outputs: tuple[Tensor, Tensor | None], before: Tensor | None,
    noise: Tensor | None, temperature: float | Tensor,
) -> tuple[Tensor, None]:  # fmt: skip
    """A `Solver` that samples x_{k-1} by the process's own ancestral step."""
    return process.ancestral_step(step, x, *outputs, noise, temperature)[0], None


def dpm(
    process: Process, step: int | Tensor, x: Tensor, outputs: tuple[Tensor, Tensor | None], before: Tensor | None,
    noise: Tensor | None, temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al. 2022), a deterministic `Solver`; its first step is of first order."""
    assert before is not None
    x0, c = process.clean(step, x, outputs[0]), process.multistep(step)
    return c["keep"] * x + c["move"] * (x0 + c["change"] * (x0 - before)), x0


SOLVERS: dict[str, Solver] = {"ddpm": ancestral, "dpm": dpm}
STOCHASTIC = {"ddpm"}  # those that need noise in each step but the last
