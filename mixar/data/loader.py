"""An endless stream of batches from a source of samples, which depends only on the seed and the images seen."""

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import LocalDataset
from streaming.base.hashing import get_hash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixar import rng
from mixar.data.batch import Batch, Picks, PreDrawn, Source
from mixar.data.images import ImageSource
from mixar.data.parts import HASH
from mixar.data.pre_draw import PRE_DRAWN, RECIPE
from mixar.data.remote import fetch
from mixar.data.workers import started, watching
from mixar.errors import UserError
from mixar.rng import Stream
from mixar.signals import held_back

__all__ = ["Batch", "ImageSource", "Loader", "PreDrawn", "ShardSource", "epoch_order"]


def epoch_order(seed: int, epoch: int, shard_sizes: Sequence[int], window: int = 64) -> NDArray[np.int64]:
    """The order of an epoch's samples, int64 [n], a permutation that depends on the arguments alone.

    Shards are shuffled, then the samples within each window of `window` consecutive shards: a remote set is read one
    window at a time, and a set of at most one window is shuffled uniformly.
    """
    epochs, shards, n = torch.tensor([epoch]), len(shard_sizes), sum(shard_sizes)
    rank = rng.permutation(seed, Stream.DATA_ORDER, epochs, shards)[0].numpy().argsort()  # of each shard
    window_of_sample = np.repeat(rank // window, shard_sizes)
    chance = rng.bits(seed, Stream.DATA_ORDER, epochs, n, start=shards)[0].numpy()
    return np.lexsort((chance, window_of_sample))


class Loader:
    """This rank's micro-batches, without end. Sample g of the run is number g % n of epoch g // n at any world size.

    Step s takes the `batch` samples from s * `batch` on; of these, micro-batch a of rank r takes `micro_batch` from
    (a * `world` + r) * `micro_batch` on.

    Args:
        source: the samples.
        batch: images per step, over all ranks; a multiple of `micro_batch` * `world`.
        workers: processes that read ahead; with 0, this process reads.
        flip: mirror each sample with probability 1/2.
        start: images seen before; the stream continues there as if it had never stopped.

    Raises:
        UserError: pre-drawn tokens made for the other `flip`; and, while iterating, whatever the source raises.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        workers: int,
        flip: bool,
        start: int = 0,
    ):
        assert batch % (micro_batch * world) == 0, "the config's check ensures it"
        if source.pre_drawn_flip not in (None, flip):
            raise UserError(
                f"the pre-drawn tokens were made with data.flip={str(source.pre_drawn_flip).lower()}: "
                "write that, or pre-draw again in another folder"
            )
        # the batch is a multiple of the stride, so the micro-batches of successive steps follow each other evenly
        picks = _Sampler(
            source.shard_sizes, seed, flip, start + rank * micro_batch, micro_batch, stride=micro_batch * world
        )
        self.loader = DataLoader(
            _Reader(source), batch_size=None, sampler=picks, num_workers=workers, pin_memory=torch.cuda.is_available()
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        with held_back():
            batches, workers = started(self.loader)
        try:
            with watching(workers):
                for batch in batches:
                    if isinstance(batch, UserError):
                        raise batch
                    yield batch
        finally:
            if workers:
                batches._shutdown_workers()  # type: ignore[attr-defined] # as at its end without an error
            for worker in workers:
                worker.kill()  # one that waits for a disk or a remote reacts to nothing milder


class _Sampler:
    """The picks of the micro-batches that start at `first`, `first + stride`, ..., without end."""

    def __init__(self, shard_sizes: list[int], seed: int, flip: bool, first: int, micro_batch: int, stride: int):
        self.shard_sizes, self.seed, self.flip = shard_sizes, seed, flip
        self.first, self.micro_batch, self.stride = first, micro_batch, stride

    def __iter__(self) -> Iterator[Picks]:
        n, epoch, order = sum(self.shard_sizes), -1, np.empty(0, np.int64)
        for first in count(self.first, self.stride):
            index, rows = torch.arange(first, first + self.micro_batch), []
            for g in index.tolist():
                if g // n != epoch:
                    epoch, order = g // n, epoch_order(self.seed, g // n, self.shard_sizes)
                rows.append(int(order[g % n]))
            flips = rng.uniform(self.seed, Stream.FLIP, index) < 0.5
            yield Picks(index, rows, flips.tolist() if self.flip else [False] * len(rows))


class _Reader(Dataset):
    """A source in the form that torch's DataLoader expects."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, picks: Picks) -> Batch | UserError:
        try:
            return self.source.read(picks)
        except UserError as error:
            return error  # raised in a worker, it would arrive wrapped in a traceback


class ShardSource:
    """Moments and codes from the shards of `prepare`, on request with the pre-drawn tokens for TI-Mix.

    Args:
        shards: a local folder, or with `cache` any URL that streaming supports.
        cache: a local folder; each set needs its own.
        pre_drawn: also read the set of `predraw`.

    Raises:
        UserError: shards that are missing or cannot be fetched; while reading, a damaged shard.
    """

    def __init__(self, shards: str, cache: str | None = None, pre_drawn: bool = False):
        self.images = _Shards(shards, cache)
        self.drawn: _Shards | None = None
        self.recipe: dict[str, Any] | None = None  # of the pre-drawn tokens
        if pre_drawn:
            self.recipe = json.loads(fetch(shards, cache, f"{PRE_DRAWN}/{RECIPE}").read_text())
            self.drawn = _Shards(f"{shards}/{PRE_DRAWN}", cache and f"{cache}/{PRE_DRAWN}")

    @property
    def pre_drawn_flip(self) -> bool | None:
        """Whether odd pre-drawn variants belong to the mirrored image; None without pre-drawn tokens."""
        return None if self.recipe is None else self.recipe["flip"]

    @property
    def digest(self) -> str:
        """16 hex digits over the names, sizes and contents of the shards, in their order."""
        files = [(shard.samples, shard.file_pairs[0][0]) for shard in self.images.dataset.shards]
        text = json.dumps([(samples, file.basename, file.hashes) for samples, file in files])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def shard_sizes(self) -> list[int]:
        """The number of images in each shard."""
        return [shard.samples for shard in self.images.dataset.shards]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def read(self, picks: Picks) -> Batch:
        """The picked images, mirrored where asked."""
        samples = [self.images[row] for row in picks.rows]
        return Batch(
            picks.index,
            picks.index.tolist(),
            [sample["key"] for sample in samples],
            torch.tensor([sample["label"] for sample in samples]),
            moments=_stack([sample["moments"][int(flip)] for sample, flip in zip(samples, picks.flips)]),
            codes=_stack([sample["codes"][int(flip)] for sample, flip in zip(samples, picks.flips)]).long(),
            drawn=self._read_drawn(self.drawn, picks) if self.drawn else None,
        )

    def _read_drawn(self, drawn: "_Shards", picks: Picks) -> PreDrawn:
        """One variant per image, in each epoch the next of those with its flip."""
        samples = []
        for g, row, flip in zip(picks.index.tolist(), picks.rows, picks.flips):
            sample, turn = drawn[row], g // len(self)
            variants = len(sample["count"])
            variant = (2 * turn + flip if self.pre_drawn_flip else turn) % variants
            samples.append({name: value[variant] for name, value in sample.items()})
        order, codes = (_stack([sample[name] for sample in samples]).long() for name in ("order", "drawn"))
        return PreDrawn(order, [int(sample["count"]) for sample in samples], codes)


class _Shards:
    """Random access to one set of MDS shards, each checked against its hash when this process first reads it.

    streaming's LocalDataset reads the shards, and its downloader fetches them. Its StreamingDataset coordinates the
    ranks of a node through shared memory, which a killed job leaves behind, which other jobs collide with, and which
    keeps file descriptors of every dataset on the machine open. Since the order depends on the seed alone, no
    coordination is needed.
    """

    def __init__(self, shards: str, cache: str | None):
        self.shards, self.cache = shards, cache
        self.dataset = LocalDataset(str(fetch(shards, cache, "index.json").parent))
        self.checked = [False] * len(self.dataset.shards)

    def __getitem__(self, row: int) -> dict[str, Any]:
        shard, _ = self.dataset.spanner[row]
        if not self.checked[shard]:
            self._check(shard)
            self.checked[shard] = True
        return self.dataset[row]

    def _check(self, shard: int) -> None:
        """Raises UserError for a file that is missing, torn or changed."""
        info, _ = self.dataset.shards[shard].file_pairs[0]
        path = Path(self.cache or self.shards, info.basename)
        if self.cache:
            fetch(self.shards, self.cache, info.basename)
        if not path.is_file() or get_hash(HASH, path.read_bytes()) != info.hashes[HASH]:
            again = f"it is fetched again; if that does not help, the remote has changed: rm -r {self.cache}"
            fix = f"rm {path}, {again}" if self.cache else f"rm -r {path.parent}, then `mixar prepare`"
            raise UserError(f"shard {path} is missing or damaged: {fix}")


def _stack(arrays: list[NDArray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
