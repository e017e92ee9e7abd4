"""The operators of random numbers: SplitMix64 spelled out, the CPU kernels, and what torch asks of an operator."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.library import opcheck
from torch.utils.data import DataLoader

from mixar.ops import random_bits, random_normal, random_uniform
from mixar.ops.random import bits_reference, normal_reference, uniform_reference

INDEX = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345678901])
KEYS = [(0, 0), (-7, 2**40 + 1), (2**62, 5)]  # with starts
DRAWS = [("bits", random_bits, bits_reference), ("uniform", random_uniform, uniform_reference),
         ("normal", random_normal, normal_reference)]  # fmt: skip


def splitmix(key: int, index: int, number: int) -> int:
    """The 64 bits of an image's number, from 1 on, in Python's integers."""
    for step in (index, number):
        key = (key + step * 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        key ^= key >> 31
    return key - (key >> 63 << 64)


@pytest.mark.parametrize(("key", "start"), KEYS)
@pytest.mark.parametrize("draw", [random_bits, bits_reference])
def test_bits_are_splitmix64(native: None, draw: Callable, key: int, start: int) -> None:
    expected = [[splitmix(key, index, start + 1 + i) for i in range(5)] for index in INDEX.tolist()]
    assert draw(INDEX, key, start, 5).tolist() == expected
    assert splitmix(0, 0, 1) % 2**64 == 0xE220A8397B1DCDAF  # the first number that the authors' code gives for seed 0


@pytest.mark.parametrize(("key", "start"), KEYS)
@pytest.mark.parametrize("count", [0, 1, 7, 64, 40_000])  # the last one in two parts
@pytest.mark.parametrize("name", [name for name, *_ in DRAWS])
def test_kernels_are_the_reference_bit_for_bit(native: None, name: str, count: int, key: int, start: int) -> None:
    _, draw, reference = next(row for row in DRAWS if row[0] == name)
    for index in (INDEX, INDEX[::2], INDEX.view(2, 3).T[1], INDEX[:0], INDEX[:1].expand(3)):
        found, expected = draw(index, key, start, count), reference(index, key, start, count)
        operator = getattr(torch.ops.mixar, f"random_{name}")(index, key, start, count)
        assert found.shape == (len(index), count) and found.dtype == expected.dtype == operator.dtype
        assert torch.equal(found, expected) and torch.equal(operator, expected)


def test_many_images_of_few_numbers(native: None) -> None:
    index = torch.arange(100_000)
    assert torch.equal(random_bits(index, 3, 0, 1), bits_reference(index, 3, 0, 1))


def test_opcheck(native: None) -> None:
    for name, *_ in DRAWS:
        operator = getattr(torch.ops.mixar, f"random_{name}").default
        for index, count in ((INDEX, 5), (INDEX[::2], 4), (INDEX[:0], 3), (INDEX, 0)):
            opcheck(operator, (index, -3, 2**40, count))


@pytest.mark.parametrize("name", [name for name, *_ in DRAWS])
def test_keys_and_starts_share_a_graph(native: None, name: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    draw = next(draw for other, draw, _ in DRAWS if other == name)
    compiled = torch.compile(lambda *given: draw(*given) + 1, backend=backend, fullgraph=True)
    for key, start in ((3, 2), (-5, 7), (2**62, 2**40), (-(2**63), 99), (2**63 - 1, 5)):
        assert torch.equal(compiled(INDEX, key, start, 6), draw(INDEX, key, start, 6) + 1)
    assert len(graphs) <= 2  # torch takes an integer for a constant until it has seen another


def test_inductor_compiles(native: None) -> None:
    compiled = torch.compile(lambda index: random_uniform(index, 5, 0, 8) * 2, fullgraph=True)
    assert torch.equal(compiled(INDEX), random_uniform(INDEX, 5, 0, 8) * 2)


def test_another_index_is_refused(native: None) -> None:
    for wrong in (INDEX.int(), INDEX.view(2, 3)):
        with pytest.raises(RuntimeError, match="index int64"):
            torch.ops.mixar.random_bits(wrong, 0, 0, 3)
    with pytest.raises(RuntimeError, match="-1 numbers"):
        torch.ops.mixar.random_bits(INDEX, 0, 0, -1)


class Drawn(torch.utils.data.Dataset):
    """Numbers drawn by a loader's worker, enough of them for several threads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        return random_bits(torch.arange(i, i + 4), 1, 0, 40_000)


def test_a_forked_worker_draws_the_same(native: None) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = [Drawn()[i] for i in range(2)]  # this process has the threads that a fork does not copy
        loader = DataLoader(Drawn(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
        assert all(torch.equal(found, row) for found, row in zip(loader, expected, strict=True))
    finally:
        torch.set_num_threads(before)


FRESH = """
import torch
from mixar import rng
from mixar.ops import load, native
draws = [getattr(rng, name) for name in ("bits", "uniform", "normal", "gumbel", "permutation")]
drawn = lambda: [draw(3, rng.Stream.NOISE, torch.arange(4), 33) for draw in draws]
before = drawn()
assert not native._taken  # a few numbers on a CPU compile nothing
load("cpu")
assert native.has_kernels("cpu") and all(map(torch.equal, before, drawn()))
"""


@pytest.mark.slow
def test_numbers_alone_compile_nothing(native: None) -> None:
    subprocess.run([sys.executable, "-c", FRESH], check=True)
