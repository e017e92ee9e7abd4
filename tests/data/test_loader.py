import multiprocessing
import os
import shutil
import signal
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import LocalDataset

from mixar import rng
from mixar.data.batch import Batch, Picks
from mixar.data.images import ImageSet, ImageSource
from mixar.data.loader import Loader, ShardSource, epoch_order
from mixar.data.pre_draw import predraw
from mixar.errors import PassingError, UserError
from mixar.prior import Prior
from mixar.rng import Stream


def take(source, count: int, **options) -> list[Batch]:
    """The first `count` micro-batches of a loader of 8 images a step."""
    settings = dict(seed=0, batch=8, micro_batch=8, rank=0, world=1, workers=0, flip=True) | options
    return list(islice(Loader(source, **settings), count))


def content(batches: list[Batch]) -> list[tuple]:
    """The samples of batches, comparable."""
    columns = ([b.host_index, b.keys, b.labels.tolist(), b.moments.numpy(), b.codes.tolist()] for b in batches)
    return [(*known, moments.tobytes(), codes) for batch in columns for *known, moments, codes in zip(*batch)]


def test_an_epoch_is_a_permutation_of_its_own():
    sizes = [7, 1, 30, 12]
    orders = [epoch_order(seed, epoch, sizes) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], epoch_order(0, 0, sizes))


def test_a_set_of_one_window_is_shuffled_uniformly():
    places = np.stack([epoch_order(0, epoch, [3, 2, 3]).argsort() for epoch in range(4000)])
    for sample in range(8):
        counts = np.bincount(places[:, sample], minlength=8)
        assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_a_large_set_is_read_a_window_of_shards_at_a_time():
    sizes = [5, 9, 4, 6, 8, 7]
    shard_of = np.repeat(np.arange(6), sizes)
    order = epoch_order(0, 3, sizes, window=2)
    visits = [set(shard_of[order[start:stop]].tolist()) for start, stop in _windows(order, shard_of)]
    assert [len(shards) for shards in visits] == [2, 2, 2] and set.union(*visits) == set(range(6))
    assert sorted(order) == list(range(39))


def _windows(order, shard_of):
    """Start and end of the runs of samples that share a window of two shards."""
    bounds, seen = [0], set()
    for place, row in enumerate(order):
        if shard_of[row] not in seen and len(seen) == 2:
            bounds, seen = [*bounds, place], set()
        seen.add(shard_of[row])
    return list(pairwise([*bounds, len(order)]))


def test_batches_follow_the_order_and_the_flips_of_the_seed(shards):
    source = ShardSource(shards)
    assert source.shard_sizes == [16, 16, 8]
    raw = LocalDataset(shards)
    seen = content(take(source, 12, seed=5))
    assert [g for g, *_ in seen] == list(range(96))
    for g, key, label, moments, codes in seen:
        row = raw[int(epoch_order(5, g // 40, [16, 16, 8])[g % 40])]
        flip = int(rng.uniform(5, Stream.FLIP, torch.tensor([g])) < 0.5)
        assert (key, label) == (row["key"], row["label"])
        assert moments == row["moments"][flip].tobytes() and codes == row["codes"][flip].tolist()


def test_every_world_size_sees_the_same_samples(shards):
    source = ShardSource(shards)
    alone = content(take(source, 6))
    for world, micro in [(1, 4), (1, 2), (2, 4), (2, 2), (4, 2), (4, 1)]:
        accumulate = 8 // (world * micro)
        ranks = [take(source, 6 * accumulate, micro_batch=micro, rank=rank, world=world) for rank in range(world)]
        assert {len(batch) for batches in ranks for batch in batches} == {micro}
        together = [batches[i] for i in range(6 * accumulate) for batches in ranks]
        assert content(together) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_gets_the_next_sample(shards, workers):
    source = ShardSource(shards)
    whole = content(take(source, 14))  # across two ends of an epoch
    assert content(take(source, 14, workers=workers)) == whole
    for done in (1, 5, 9):
        assert content(take(source, 14 - done, workers=workers, start=8 * done)) == whole[8 * done :]


def test_half_of_the_samples_are_flipped_or_none():
    images = ImageSet(["a"], [0] * 10, [str(i) for i in range(10)], [np.eye(4, dtype=np.uint8) * 255] * 10)
    batch = take(ImageSource(images, 4), 1, batch=4000, micro_batch=4000)[0]
    share = (batch.images[:, 0, 0, 0] == 0).float().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / 4000**0.5
    assert take(ImageSource(images, 4), 1, flip=False)[0].images[:, 0, 0, 0].min() == 255


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["torn", "bit", "gone"])
def test_a_damaged_shard_is_named_with_what_mends_it(shards, workers, damage):
    path = Path(shards) / "part-00001/shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data[:-9] if damage == "torn" else data)
    with pytest.raises(UserError) as error:
        take(ShardSource(shards), 5, workers=workers)
    assert str(error.value) == f"shard {path} is missing or damaged: rm -r {path.parent}, then `mixar prepare`"


def test_a_loader_process_that_is_killed_ends_with_a_sentence(shards):
    batches = iter(Loader(ShardSource(shards), 0, 8, 8, 0, 1, 1, True))
    others = set(multiprocessing.active_children())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(PassingError, match=r"a loader process was killed.*data\.workers"):
        for _ in range(100):
            next(batches)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_remote_is_read_through_its_cache(shards, tmp_path, scheme):
    remote, cache = scheme + shards, tmp_path / "cache"
    expected = content(take(ShardSource(shards), 5))
    source = ShardSource(remote, str(cache))
    assert not list(cache.rglob("*.mds"))  # only what is read is fetched
    assert content(take(source, 5, workers=2)) == expected
    shutil.rmtree(shards)
    assert content(take(ShardSource(remote, str(cache)), 5)) == expected


def test_a_damaged_cache_and_a_remote_that_is_not_there(shards, tmp_path):
    cache = tmp_path / "cache"
    take(ShardSource(shards, str(cache)), 5)
    path = cache / "part-00000/shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"rm {path}, it is fetched again"):
        take(ShardSource(shards, str(cache)), 5)
    with pytest.raises(UserError, match="cannot fetch"):
        ShardSource(str(tmp_path / "none"), str(tmp_path / "other"))


def _read_all(shards: str, cache: str | None, start, results) -> None:
    start.wait()
    results.put(content(take(ShardSource(shards, cache), 5, workers=1)))


@pytest.mark.parametrize("cached", [False, True])
def test_processes_read_the_same_shards_at_once(shards, tmp_path, cached):
    cache = str(tmp_path / "cache") if cached else None
    expected = content(take(ShardSource(shards), 5))
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.SimpleQueue()
    processes = [context.Process(target=_read_all, args=(shards, cache, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get() for _ in processes] == [expected] * 3
    for process in processes:
        process.join()


def test_pre_drawn_tokens_come_with_their_image_and_flip(make_config, shards):
    config = make_config("ti_mix.variants=4")
    predraw(config, Prior(config.prior).eval(), "cpu", progress=False)
    source = ShardSource(shards, pre_drawn=True)
    keys = [row["key"] for row in LocalDataset(shards)]
    stored = LocalDataset(f"{shards}/ti_mix")
    used = set()
    for batch in take(source, 20):
        for b, g in enumerate(batch.index.tolist()):
            order, count, drawn = batch.drawn.order[b].tolist(), batch.drawn.count[b], batch.drawn.codes[b]
            flip = bool(rng.uniform(0, Stream.FLIP, torch.tensor([g])) < 0.5)
            variant = 2 * (g // 40 % 2) + flip  # the epochs take turns
            row = stored[keys.index(batch.keys[b])]
            assert order == row["order"][variant].tolist() and count == row["count"][variant]
            assert drawn.tolist() == row["drawn"][variant].tolist()
            visible = order[count:]
            assert torch.equal(drawn[visible], batch.codes[b][visible])  # so they are of this flip
            used.add((batch.keys[b], variant))
    assert len(used) > 80
    with pytest.raises(UserError, match=r"data\.flip=true"):
        take(source, 1, flip=False)


def test_pre_drawn_tokens_of_images_as_they_are(make_config, shards):
    config = make_config("ti_mix.variants=3", "data.flip=false")
    predraw(config, Prior(config.prior).eval(), "cpu", progress=False)
    source = ShardSource(shards, pre_drawn=True)
    stored = LocalDataset(f"{shards}/ti_mix")
    for epoch in range(4):
        batch = source.read(Picks(torch.tensor([40 * epoch]), [7], [False]))
        assert batch.drawn.order[0].tolist() == stored[7]["order"][epoch % 3].tolist()


def test_pre_drawn_tokens_that_are_not_there(shards):
    with pytest.raises(UserError, match=r"ti_mix/pre_drawn\.json is missing"):
        ShardSource(shards, pre_drawn=True)


def test_batches_move_with_all_that_is_in_them(make_config, shards):
    config = make_config("ti_mix.variants=2")
    predraw(config, Prior(config.prior).eval(), "cpu", progress=False)
    batch = take(ShardSource(shards, pre_drawn=True), 1)[0].to("meta")
    assert batch.images is None and len(batch.keys) == 8 and len(batch.drawn.count) == 8
    for tensor, shape, dtype in [
        (batch.index, (8,), torch.int64),
        (batch.labels, (8,), torch.int64),
        (batch.moments, (8, 6, 4, 4), torch.float16),
        (batch.codes, (8, 16), torch.int64),
        (batch.drawn.order, (8, 16), torch.int64),
        (batch.drawn.codes, (8, 16), torch.int64),
    ]:
        assert (tensor.device.type, tensor.shape, tensor.dtype) == ("meta", shape, dtype)


def test_selected_samples_keep_together(make_config, shards):
    config = make_config("ti_mix.variants=2")
    predraw(config, Prior(config.prior).eval(), "cpu", progress=False)
    batch = take(ShardSource(shards, pre_drawn=True), 1)[0]
    chosen = batch.select([5, 0])
    assert content([chosen]) == [content([batch])[i] for i in (5, 0)]
    assert chosen.host_index == chosen.index.tolist() == [5, 0]
    assert chosen.drawn.count == [batch.drawn.count[i] for i in (5, 0)]
    assert torch.equal(chosen.drawn.order, batch.drawn.order[[5, 0]])
    assert torch.equal(chosen.drawn.codes, batch.drawn.codes[[5, 0]])
