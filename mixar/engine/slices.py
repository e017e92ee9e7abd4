"""Tensors of which each rank holds a contiguous slice, saved and loaded by torch.distributed.checkpoint.

Whether an engine shards by rows or by flat partitions, a rank's share of a tensor is a contiguous range of its
flattened elements. Files hold the tensors in their own shapes, so that every engine, `mixar export` and torch's own
tools can read them.
"""

import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

# torch warns at every checkpoint of a single process, which is intended here
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `start + len(flat)` of a tensor of `shape`, flattened.

    Attributes:
        flat: 1-D; shares its memory with the engine's own tensor.
    """

    shape: torch.Size
    start: int
    flat: Tensor

    def like(self, flat: Tensor) -> "Slice":
        """A slice of the same elements of another tensor of this shape, with the values `flat`."""
        return Slice(self.shape, self.start, flat)

    def of(self, full: Tensor) -> Tensor:
        """These elements of the complete tensor `full`."""
        return full.reshape(-1)[self.start : self.start + len(self.flat)]

    def blocks(self) -> dict[torch.Size, Tensor]:
        """The slice as rectangles of the tensor by offset: of a matrix part of a row, full rows, part of a row."""
        found = {}
        for begin, offsets, sizes in _rectangles(self.start, self.start + len(self.flat), tuple(self.shape)):
            first = begin - self.start
            found[torch.Size(offsets)] = self.flat[first : first + math.prod(sizes)].view(sizes)
        return found


def _rectangles(start: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Elements `start` to `end` of a tensor of `shape` as (first element, offsets, sizes), in order."""
    if start >= end:
        return
    if not shape:
        yield start, [], []
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows
    if first > last:  # within one row
        yield from _in_row(start, end, shape, last)
        return
    yield from _in_row(start, first * row, shape, first - 1)
    if first < last:
        yield first * row, [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]]
    yield from _in_row(last * row, end, shape, last)


def _in_row(start: int, end: int, shape: tuple[int, ...], row: int) -> Iterator[tuple[int, list[int], list[int]]]:
    base = row * math.prod(shape[1:])
    for begin, offsets, sizes in _rectangles(start - base, end - base, shape[1:]):
        yield base + begin, [row, *offsets], [1, *sizes]


class _SavePlanner(DefaultSavePlanner):
    """A plan for writing slices; the default planner checks that they cover every tensor exactly once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self.state_dict.items():
            properties = TensorProperties.create_from_tensor(piece.flat)
            for offsets, block in piece.blocks().items():
                chunk = ChunkStorageMetadata(offsets, block.shape)
                data = TensorWriteData(chunk, properties, piece.shape)
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].blocks()[index.offset]


class _LoadPlanner(DefaultLoadPlanner):
    """A plan for reading into slices, however the file is sharded."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        assert self.metadata is not None
        for name, piece in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != piece.shape:
                found = list(saved.size) if isinstance(saved, TensorStorageMetadata) else "nothing"
                raise ValueError(f"it holds {found} as {name}, but the model has {list(piece.shape)}")
            chunks = [ChunkStorageMetadata(offsets, block.shape) for offsets, block in piece.blocks().items()]
            items += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].blocks()[index.offset]


# the classes in a checkpoint's index; values of torch.dtype are allowed, too
_INDEX = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its module in Python 3.13
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that builds only the classes of an index, so that an untrusted checkpoint cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _INDEX.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint of mixar does")


class _Reader(dcp.FileSystemReader):
    """torch's reader with a safe unpickler for the index."""

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _IndexUnpickler(file).load()


def save_slices(state: Mapping[str, Slice], folder: Path, group: Any = None) -> None:
    """Write `state` to `folder`, each rank of `group` its own slices; a collective, unless `group` is None.

    Raises:
        CheckpointException: on every rank, if any of them cannot write.
    """
    dcp.save(dict(state), checkpoint_id=folder, planner=_SavePlanner(), process_group=group, no_dist=group is None)


def load_slices(state: Mapping[str, Slice], folder: Path, group: Any = None) -> None:
    """Fill the slices of `state` from `folder`, which any engine and number of ranks may have written.

    A collective, unless `group` is None.

    Raises:
        CheckpointException: on every rank, if any of them finds a damaged file, or one of another model.
    """
    dcp.load(
        dict(state), storage_reader=_Reader(folder), planner=_LoadPlanner(), process_group=group, no_dist=group is None
    )
