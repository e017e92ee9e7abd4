"""Arrays of npz files that anybody may have made: nothing in them runs, and none is larger than its file can be."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from mixar.errors import UserError

# photographs do not compress 200-fold; a file that claims more is to fill the memory
SMALL, LARGEST_RATIO = 1 << 28, 200
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)  # what zipfile and numpy raise


class Npz:
    """An npz, of whose arrays only those that are asked for are read.

    Args:
        what: is expected in it, for the messages.

    Attributes:
        names: of its arrays.

    Raises:
        UserError: no such file, or no npz.
    """

    def __init__(self, path: str | Path, what: str) -> None:
        self.path, self.what = path, what
        with self._telling(), zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """An array's shape and type, which agree with its size in the file.

        Raises:
            UserError: a broken file; an array of python objects, or of more than this file can hold.
        """
        with self._telling(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            shape, _, dtype = self._header(archive, name, member)
            return shape, dtype

    def load(self, name: str) -> np.ndarray:
        """A whole array. UserError as `header`."""
        self.header(name)
        with self._telling(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """An array's rows one after the other: all 50,000 images of 256x256 would take 10 GB. UserError as `header`."""
        with self._telling(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            (count, *shape), by_columns, dtype = self._header(archive, name, member)
            if by_columns:
                raise UserError(f"`{name}` of {self.path} lies in Fortran's order: save np.ascontiguousarray of it")
            for _ in range(count):
                row = member.read(math.prod(shape) * dtype.itemsize)
                yield np.frombuffer(row, dtype).reshape(shape)

    def _header(self, archive: zipfile.ZipFile, name: str, member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(member)
        what, info = f"`{printable(name)}` of {self.path}", archive.getinfo(f"{name}.npy")
        if dtype.hasobject:
            raise UserError(f"{what} holds python objects, which may run code: save it as an array of numbers")
        if min(shape, default=0) < 0 or member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise UserError(f"{what} is not as long as its shape {list(shape)} says: fetch the file again")
        if info.file_size > max(SMALL, LARGEST_RATIO * info.compress_size):
            raise UserError(
                f"{what} would grow from {info.compress_size:,} to {info.file_size:,} bytes, as no images do: take it "
                "from a source that you trust, and save it with np.savez"
            )
        return shape, by_columns, dtype

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            reason = printable(str(error))
            raise UserError(f"no {self.what} at {self.path}, or a broken file ({reason}): name another") from None


def printable(text: str) -> str:
    """`text` with its control characters escaped: names in files of others must not steer a terminal or forge lines."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
