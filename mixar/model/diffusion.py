"""The diffusion process of the head: improved DDPM (Nichol & Dhariwal 2021) on continuous tokens, with a cosine
schedule of 1000 steps and learned variances.

Tables are computed in float64 and gathered into float32. All arithmetic here is float32, also under autocast, since
x0 at t = 999 multiplies ε by 2e4.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixar.config import STEPS, respaced_steps
from mixar.model.process import Network, Process


def cosine_betas(steps: int = STEPS) -> np.ndarray:
    """β of the cosine schedule, float64 [steps]."""

    def alpha_bar(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])


class Diffusion(Process):
    """DDPM: the tables of a (respaced) process, its losses and its sampling step.

    Args:
        spec: a respacing as in `respaced_steps`; None keeps all 1000 steps.
        last: the training step that sampling starts from, 999 in the reference; the respacing divides 0..last.

    Attributes:
        timesteps: int64 [K], the training step of each step of this process.
    """

    learns_variance = True
    levels = STEPS

    def __init__(self, spec: str | None = None, last: int = STEPS - 1) -> None:
        kept = list(range(STEPS)) if spec is None else respaced_steps(spec, last + 1)
        full = np.cumprod(1 - cosine_betas())[kept]
        # on the full schedule 1 - ᾱ_k/ᾱ_{k-1} would only add rounding to β
        betas = cosine_betas() if spec is None else 1 - full / np.append(1.0, full[:-1])
        alphas_bar = np.cumprod(1 - betas)
        previous = np.append(1.0, alphas_bar[:-1])
        variance = betas * (1 - previous) / (1 - alphas_bar)
        alpha, sigma = np.sqrt(alphas_bar), np.sqrt(1 - alphas_bar)
        self.tables = {
            "betas": betas,
            "alphas_cumprod": alphas_bar,
            "posterior_variance": variance,
            # entry 0 is zero, so the logarithm of entry 1 is used for it
            "posterior_log_variance_clipped": np.log(
                np.append(variance[1:2] if len(variance) > 1 else betas, variance[1:])
            ),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_bar),
            "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_bar),
            "sqrt_alphas_cumprod": alpha,
            "sqrt_one_minus_alphas_cumprod": sigma,
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_bar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_bar - 1),
            "log_betas": np.log(betas),
        }
        timesteps = torch.tensor(kept, device="cpu")  # on the CPU, also if the model is built on the meta device
        super().__init__(timesteps, alpha, sigma, {name: self.tables[name] for name in _USED})

    @staticmethod
    def times(u: Tensor) -> Tensor:
        return (u * STEPS).long()

    @staticmethod
    def loss_bytes(channels: int) -> int:
        # float32: 13 values and two flags per channel; 8 coefficients, a flag and the timestep (int64) per row
        return (13 * 4 + 2) * channels + 8 * 4 + 1 + 8

    def losses(self, net: Network, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of Eq. 5 per row, and the variational term that trains the variance.

        Args:
            net: (x_t [R, C], t [R]) to ε and v, [R, C] each.
            x0: clean tokens [R, C].
            t: int64 [R] in 0..999.
            noise: ε [R, C].

        Returns:
            mse [R], the mean over channels of (ε - ε̂)²; vb [R] in bits per dimension, without a gradient to ε̂.
        """
        c = self.coefficients(t)
        x_t = c["sqrt_alphas_cumprod"] * x0 + c["sqrt_one_minus_alphas_cumprod"] * noise
        eps, v = net(x_t, t)
        assert v is not None
        mse = (noise - eps).square().mean(-1)
        true_mean = c["posterior_mean_coef1"] * x0 + c["posterior_mean_coef2"] * x_t
        true_log_var = c["posterior_log_variance_clipped"]
        mean, log_var = self._posterior(c, x_t, eps.detach(), v)[1:]
        kl = 0.5 * (
            log_var
            - true_log_var
            - 1
            + torch.exp(true_log_var - log_var)
            + (true_mean - mean).square() * torch.exp(-log_var)
        )
        nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_var)
        vb = torch.where(t == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)
        return mse, vb

    def _posterior(self, c: dict[str, Any], x: Tensor, eps: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x0 = _clean(c, x, eps)
        fraction = (v + 1) / 2
        log_var = fraction * c["log_betas"] + (1 - fraction) * c["posterior_log_variance_clipped"]
        return x0, c["posterior_mean_coef1"] * x0 + c["posterior_mean_coef2"] * x, log_var

    def clean(self, step: int | Tensor, x: Tensor, prediction: Tensor) -> Tensor:
        return _clean(self.coefficients(step), x, prediction)

    def ancestral_step(
        self, step: int | Tensor, x: Tensor, eps: Tensor, v: Tensor | None, noise: Tensor | None,
        temperature: float | Tensor, /,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """x_{k-1} sampled from x_k; see `Process.ancestral_step`.

        Returns:
            the sample [R, C], and the mean, log_variance and pred_xstart that it was computed from.
        """
        assert v is not None
        x0, mean, log_var = self._posterior(self.coefficients(step), x, eps, v)
        parts = {"mean": mean, "log_variance": log_var, "pred_xstart": x0}
        if noise is None:
            assert step == 0, "only the last step adds no noise"
            return mean, parts
        noisy = (step > 0).float()[:, None] if isinstance(step, Tensor) else float(step > 0)
        return mean + torch.exp(0.5 * log_var) * (noisy * temperature * noise), parts


def _clean(c: dict[str, Any], x: Tensor, eps: Tensor) -> Tensor:
    """x0 computed from x_k and ε."""
    return c["sqrt_recip_alphas_cumprod"] * x - c["sqrt_recipm1_alphas_cumprod"] * eps


_USED: Sequence[str] = (
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_log_variance_clipped",
    "log_betas",
)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P of x under a Gaussian over bins of width 2/255 on [-1, 1], the CDF by its tanh approximation."""

    def cdf(y: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y.pow(3))))

    centred, inverse_std = x - mean, torch.exp(-log_std)
    upper = cdf(inverse_std * (centred + 1 / 255))
    lower = cdf(inverse_std * (centred - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()
