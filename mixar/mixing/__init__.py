"""The core of the paper as pure functions: the mask (Eq. 8) and the mixtures (Eqs. 9-12)."""

from mixar.mixing.masking import Masking, Room, masked_counts, ratio_quantile, rooms
from mixar.mixing.ti_mix import Mixture, ground_truth_share, ti_mix

__all__ = ["Masking", "Mixture", "Room", "ground_truth_share", "masked_counts", "ratio_quantile", "rooms", "ti_mix"]
