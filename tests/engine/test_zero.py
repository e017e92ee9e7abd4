"""What DeepSpeed is told about the rank's card."""

import json
from pathlib import Path

import pytest

from tests.home import end, fork_ranks, train_arguments

pytestmark = pytest.mark.slow

# each rank sees one card, as with `srun --gpus-per-task=1`; DeepSpeed's accelerator notes the card it is asked for
ONE_CARD_EACH = """
import atexit, json, os, torch
from mixar import dist
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.accelerator import get_accelerator
dist._device = lambda local_rank: torch.device("cpu", 0)
accelerator, cards = get_accelerator(), []
for name in ("set_device", "device_name"):
    def noted(index=None, method=getattr(accelerator, name)):
        cards.append(str(index))
        return method(index)
    setattr(accelerator, name, noted)
dist.end = lambda status: None  # there is something to print
import mixar.train
mixar.train.main()
rank = os.environ["RANK"]
print("asked", rank, json.dumps([os.environ["LOCAL_RANK"], sorted({card for card in cards if card.isdigit()})]))
"""


def test_deepspeed_takes_the_only_card_that_a_rank_sees(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    overrides = ["engine.name=zero3", "train.epochs=0.5"]
    arguments = ["-c", ONE_CARD_EACH, *train_arguments(home, tmp_path / "run", *overrides)[1:]]
    assert end(fork_ranks(arguments, 2, None, log)) == [0, 0], log.read_text()[-3000:]
    asked = dict(line.split(maxsplit=2)[1:] for line in log.read_text().splitlines() if line.startswith("asked"))
    assert {rank: json.loads(found) for rank, found in asked.items()} == {"0": ["0", ["0"]], "1": ["1", ["0"]]}
