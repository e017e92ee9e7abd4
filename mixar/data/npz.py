"""Reading npz files from untrusted sources, without running code or filling the memory, and writing ADM's form."""

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from einops import rearrange
from torch import Tensor

from mixar.errors import UserError
from mixar.files import replacing

# photographs do not compress 200-fold: a file that claims more is made to fill the memory
SMALL, LARGEST_RATIO = 1 << 28, 200
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)  # what zipfile and numpy raise


class Npz:
    """An npz whose arrays are read one at a time, on demand.

    Args:
        what: the kind of content expected, for error messages.

    Attributes:
        names: the names of its arrays.

    Raises:
        UserError: no such file, or a file that is not an npz.
    """

    def __init__(self, path: str | Path, what: str) -> None:
        self.path, self.what = path, what
        with self._reporting(), zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """An array's shape and type, checked against its size in the file.

        Raises:
            UserError: a broken file, an array of Python objects, or one larger than this file can hold.
        """
        with self._reporting(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            shape, _, dtype = self._header(archive, name, member)
            return shape, dtype

    def load(self, name: str) -> np.ndarray:
        """A whole array. UserError as `header`."""
        self.header(name)
        with self._reporting(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The rows of an array one by one, since 50,000 images of 256x256 take 10 GB. UserError as `header`."""
        with self._reporting(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            (count, *shape), by_columns, dtype = self._header(archive, name, member)
            if by_columns:
                raise UserError(f"`{name}` of {self.path} is in Fortran order: save np.ascontiguousarray of it")
            for _ in range(count):
                row = member.read(math.prod(shape) * dtype.itemsize)
                yield np.frombuffer(row, dtype).reshape(shape)

    def _header(self, archive: zipfile.ZipFile, name: str, member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(member)
        what, info = f"`{name}` of {self.path}", archive.getinfo(f"{name}.npy")
        if dtype.hasobject:
            raise UserError(f"{what} holds Python objects, which may run code: save it as an array of numbers")
        if min(shape, default=0) < 0 or member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise UserError(f"{what} is not as long as its shape {list(shape)} says: download the file again")
        if info.file_size > max(SMALL, LARGEST_RATIO * info.compress_size):
            raise UserError(
                f"{what} would grow from {info.compress_size:,} to {info.file_size:,} bytes, more than images do: "
                "get it from a source that you trust, and save it with np.savez"
            )
        return shape, by_columns, dtype

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            raise UserError(f"no {self.what} at {self.path}, or a broken file ({error}): name another") from None


def write_npz(path: str | Path, batches: Iterable[Tensor], count: int, labels: Tensor | None = None) -> None:
    """Write `count` images, from batches uint8 [B, 3, H, W], in the form of ADM's evaluation, one batch at a time.

    The npz holds `arr_0` uint8 [n, H, W, 3] and, with `labels` int [n], `arr_1`. It holds no time stamps, so that the
    same images give the same bytes.

    Raises:
        UserError: `path` cannot be written.
    """
    written = 0
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            for images in batches:
                rows = rearrange(images, "b c h w -> b h w c").cpu().contiguous().numpy()
                if written == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *rows.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(rows.tobytes())
                written += len(rows)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, labels.cpu().long().numpy())
        assert written == count, f"{written} images were given, {count} were announced"
