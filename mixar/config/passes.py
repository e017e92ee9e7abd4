"""The division of a step's batch over ranks, and over the passes of each rank."""

import math

from mixar.config.knobs import Config
from mixar.errors import UserError


def images_per_pass(config: Config, ranks: int) -> int:
    """The micro-batch of a run on `ranks` ranks: up to `train.micro_batch`, as large as possible.

    It divides each rank's share of the batch, and consists of complete mask groups.

    Raises:
        UserError: the batch does not divide over the ranks, or a rank's share not into passes of mask groups.
    """
    batch, mask, most = config.train.batch, config.mask, config.train.micro_batch
    if batch % ranks:
        fitting = math.ceil(batch / ranks) * ranks
        raise UserError(f"train.batch={batch} does not divide over {ranks} ranks: write train.batch={fitting}")
    share = batch // ranks
    group = mask.group if config.task == "mixar" and mask.ratio_scope == "image" else 1
    limit = share if most is None else min(most, share)
    micro = next((images for images in range(limit - limit % group, 0, -group) if share % images == 0), None)
    if micro is not None:
        return micro
    among = "" if ranks == 1 else f" on {ranks} ranks"
    smaller = next(size for size in range(limit, 0, -1) if group % size == 0 == share % size)
    whole = math.ceil(share / group) * group  # groups
    larger = f"train.batch={whole * ranks}" if whole > share else f"train.micro_batch={group}"
    raise UserError(
        f"mask.group={group} does not divide the micro-batch {limit}{among}: write mask.group={smaller}, or {larger}"
    )
