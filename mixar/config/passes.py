"""How a step's batch is laid over ranks and over the passes of each."""

import math

from mixar.config.knobs import Config
from mixar.errors import UserError


def images_per_pass(config: Config, ranks: int) -> int:
    """The micro-batch of a run on so many ranks: `train.micro_batch`, else each rank's whole share of the batch.

    Raises:
        UserError: a batch that does not divide over the ranks, a share into passes, or a pass into groups of masks.
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
