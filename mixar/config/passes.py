"""The division of a step's batch over ranks, and over the passes of each rank."""

import math

from mixar.config.knobs import Config
from mixar.errors import UserError


def images_per_pass(config: Config, ranks: int) -> int:
    """The micro-batch of a run on `ranks` ranks: `train.micro_batch`, or each rank's complete share of the batch.

    Raises:
        UserError: the batch does not divide over the ranks, a share not into passes, or a pass not into mask groups.
    """
    batch, mask = config.train.batch, config.mask
    if batch % ranks:
        fitting = math.ceil(batch / ranks) * ranks
        raise UserError(f"train.batch={batch} does not divide over {ranks} ranks: write train.batch={fitting}")
    share = batch // ranks
    micro = config.train.micro_batch or share
    if share % micro:
        whole = f"train.batch={batch}" if ranks == 1 else f"the {share} images of each of {ranks} ranks"
        fitting = math.ceil(share / micro) * micro * ranks
        raise UserError(
            f"train.micro_batch={micro} does not divide {whole}: write train.batch={fitting}, or "
            f"train.micro_batch={math.gcd(micro, share)}"
        )
    if config.task == "mixar" and mask.ratio_scope == "image" and micro % mask.group:
        among = "" if ranks == 1 else f" on {ranks} ranks"
        raise UserError(
            f"mask.group={mask.group} does not divide the micro-batch {micro}{among}: "
            f"write mask.group={math.gcd(mask.group, micro)}, or a train.micro_batch that it divides"
        )
    return micro
