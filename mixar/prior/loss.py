"""The prior's training: MaskBit's mask and its cross-entropy."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def training_mask(targets: Tensor, u_ratio: Tensor, u_mask: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Mask each sub-token by itself, at a rate that every image draws by the arccos law.

    Args:
        targets: int64 [B, N, m] sub-tokens.
        u_ratio: [B] uniform on [0, 1), for the image's rate arccos(u) / (π/2).
        u_mask: [B, N, m] uniform on [0, 1), masked where below the rate.
        mask_id: the id to put in.

    Returns:
        The network's input int64 [B, N, m], and where it is masked, bool [B, N, m].
    """
    masked = u_mask < (torch.acos(u_ratio) / (math.pi / 2))[:, None, None]
    return targets.masked_fill(masked, mask_id), masked


def masked_loss(logits: Tensor, targets: Tensor, masked: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy, in float32.

    Args:
        logits: [B, N, m, K].
        targets: int64 [B, N, m].
        masked: bool [B, N, m].
        smoothing: probability mass spread over all K classes.

    Returns:
        The mean over all sub-tokens, masked or not, which is the loss; and the mean over the masked ones, without
        gradient, to log (0 where none is masked).
    """
    each = F.cross_entropy(logits.float().flatten(0, 2), targets.flatten(), reduction="none", label_smoothing=smoothing)
    where = masked.flatten()
    return each.mean(), (each.detach() * where).sum() / where.sum().clamp_min(1)
