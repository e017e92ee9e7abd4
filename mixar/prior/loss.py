"""The prior's training loss: MaskBit's mask and cross-entropy."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def training_mask(targets: Tensor, u_ratio: Tensor, u_mask: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Mask each sub-token independently, with a rate per image that follows the arccos law.

    Args:
        targets: int64 [B, N, m] sub-tokens.
        u_ratio: [B] uniform on [0, 1), for the rate per image arccos(u) / (π/2).
        u_mask: [B, N, m] uniform on [0, 1); a sub-token is masked where this is below the rate.
        mask_id: the id of a masked sub-token.

    Returns:
        The network's input int64 [B, N, m], and bool [B, N, m], True where it is masked.
    """
    masked = u_mask < (torch.acos(u_ratio) / (math.pi / 2))[:, None, None]
    return targets.masked_fill(masked, mask_id), masked


def masked_loss(logits: Tensor, targets: Tensor, masked: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy, in float32.

    Args:
        logits: [B, N, m, K].
        targets: int64 [B, N, m].
        masked: bool [B, N, m].
        smoothing: probability mass that is spread over all K classes.

    Returns:
        The loss, which is the mean over all sub-tokens, masked or not; and the mean over the masked ones, without
        gradient, for the log (0 if none is masked).
    """
    each = F.cross_entropy(logits.float().flatten(0, 2), targets.flatten(), reduction="none", label_smoothing=smoothing)
    where = masked.flatten()
    return each.mean(), (each.detach() * where).sum() / where.sum().clamp_min(1)
