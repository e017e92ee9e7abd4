"""A set of MDS shards written in parts, so that processes share the work and an interrupted one resumes.

Layout: `part-00000/{shard.00000.mds, ..., index.json, part.json}`, ..., and a root `index.json` over all parts.
"""

import errno
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from streaming import MDSWriter
from tqdm import tqdm

from mixar.data.remote import PART
from mixar.errors import PassingError, UserError
from mixar.files import LOCKLESS, creating_folder, try_writing, write_json

HASH = "xxh3_64"
SIZE = 1024  # rows per part: the most that a kill can cost; with images of 256 pixels, a shard of 68 MB
LOCK = ".lock"  # the process that writes part p locks byte p of it
POLL = 1  # seconds between checks of the parts that others write

Row = dict[str, Any]
RowsOf = Callable[[Iterator[range]], Iterator[tuple[range, Iterator[Row], dict[str, Any]]]]


def local_folder(shards: str) -> Path:
    """The folder `shards`, checked before anything expensive is done; it need not exist yet.

    Raises:
        UserError: a remote, or a folder that cannot be written.
    """
    if ":/" in shards:
        raise UserError(f"data.shards={shards}: write a local folder, and copy it to the remote")
    folder = Path(shards)
    try:
        try_writing(folder)
    except OSError as error:
        raise _unwritable(folder, f"{error.filename}: {error.strerror}") from None
    return folder


class Parts:
    """The parts of one set. Part p holds rows p * size to (p + 1) * size.

    Args:
        folder: a local folder, created where it is missing.
        recipe: what the rows are made from, as plain values; every part stores it.
        rows: the number of rows of the whole set, including rows that turn out broken.
        size: rows per part; a set that has parts keeps their size.

    Raises:
        UserError: a folder that cannot be written, or that has parts of another recipe.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], rows: int, size: int):
        self.folder, self.rows = folder, rows
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error.strerror) from None
        begun = next(iter(sorted(folder.glob(f"part-*/{PART}"))), None)
        self.size: int = _read(begun)["recipe"]["part_size"] if begun else size
        self.recipe = {**recipe, "part_size": self.size}
        self.names = [f"part-{part:05d}" for part in range(-(-rows // self.size))]
        self._claimed: set[int] = set()
        self._lockless = False  # known once a part is locked
        self._waiting = False  # for other processes
        self._check_recipes(self.summaries())

    def summaries(self) -> list[dict[str, Any]]:
        """The summaries of the finished parts, in order."""
        return [_read(self.folder / name / PART) for part, name in enumerate(self.names) if self._finished(part)]

    def todo(self) -> list[int]:
        """The parts that are not finished."""
        return [part for part in range(len(self.names)) if not self._finished(part)]

    def write(self, rank: int, world: int, columns: dict[str, str], rows_of: RowsOf, progress: bool) -> None:
        """Write the missing parts, first every `world`-th one from `rank` on, until the set is complete.

        A part is written by one process at a time and appears complete or not at all. Processes share the work
        without communication: each takes parts that nobody is writing, then waits for those that others are writing,
        and takes them over from processes that die.

        Args:
            columns: MDS encodings by column.
            rows_of: gives for each range of rows the range, its rows in order, and a summary that is complete once
                the rows are taken and is stored with them. It may take ranges ahead of the rows.
            progress: show a bar.

        Raises:
            UserError: a folder that cannot be written, or is full.
            PassingError: on a disk without locks, parts of other ranks are missing.
        """
        try:
            lock = (self.folder / LOCK).open("a")
        except OSError as error:
            raise _unwritable(self.folder, error.strerror) from None
        own = sum(len(self._range(part)) for part in self.todo() if part % world == rank)
        with lock, tqdm(total=own, unit="img", disable=not progress) as bar:
            while True:
                for indices, rows, summary in rows_of(self._claim(lock, rank, world)):
                    part = indices.start // self.size
                    bar.total += len(indices) if part % world != rank else 0
                    self._write_part(part, rows, summary, columns, bar)
                if not (others := self.todo()):
                    return
                self._wait(len(others))

    def _claim(self, lock: IO[str], rank: int, world: int) -> Iterator[range]:
        """The row ranges of the parts that nobody writes, those of `rank` first, claimed as they are taken."""
        for part in sorted(self.todo(), key=lambda part: (part - rank) % world):
            if part in self._claimed or not self._lock(lock, part) or (self._lockless and part % world != rank):
                continue
            if not self._finished(part):  # the last holder of the lock may have finished it
                self._claimed.add(part)
                yield self._range(part)

    def _lock(self, lock: IO[str], part: int) -> bool:
        """Whether this process has the lock of `part`, so that no other one writes it."""
        try:
            # unlike flock's, this lock is not inherited by the loader's workers, and it ends with the process
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)
        except OSError as error:
            if error.errno in LOCKLESS:
                self._lockless = True
            elif error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            else:
                raise _unwritable(self.folder, error.strerror) from None
        return True

    def _wait(self, others: int) -> None:
        """Wait a moment for the parts of others."""
        if self._lockless:
            raise PassingError(
                f"{len(self.names) - others} of {len(self.names)} parts of {self.folder} are written, and the rest is "
                "left to other ranks, since the disk has no file locks to coordinate them: run the same command again "
                "when they have ended, and never two with the same --rank"
            )
        if not self._waiting:
            tqdm.write(f"waiting for {others} parts of {self.folder} that other processes are writing", file=sys.stderr)
            self._waiting = True
        time.sleep(POLL)

    def _write_part(
        self, part: int, rows: Iterator[Row], summary: dict[str, Any], columns: dict[str, str], bar: tqdm
    ) -> None:
        final = self.folder / self.names[part]
        if final.is_dir() and not self._finished(part):  # a file was removed from it
            shutil.rmtree(final)
        for leftover in self.folder.glob(f".{final.name}.*"):  # left by a process that was killed
            shutil.rmtree(leftover)
        try:
            with creating_folder(final) as aside:
                # one shard per part: size limits would leave a small shard at each end
                with MDSWriter(columns=columns, out=str(aside), hashes=[HASH], size_limit=None) as writer:
                    for row in rows:
                        writer.write(row)
                        bar.update()
                write_json(aside / PART, {"recipe": self.recipe, "parts": len(self.names), **summary})
        except UserError:
            # a network disk may show late what another process has finished
            if not self._finished(part):
                raise

    def close(self) -> list[dict[str, Any]]:
        """Write the root index over all parts, which must be finished, and return their summaries.

        streaming's own merge_index would include other sets below this folder, and is not atomic.
        """
        summaries, shards = self.summaries(), []
        self._check_recipes(summaries)
        for name in self.names:
            for shard in json.loads((self.folder / name / "index.json").read_text())["shards"]:
                shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
                shards.append(shard)
        write_json(self.folder / "index.json", {"version": 2, "shards": shards})
        return summaries

    def _finished(self, part: int) -> bool:
        return (self.folder / self.names[part] / PART).is_file()

    def _range(self, part: int) -> range:
        return range(part * self.size, min((part + 1) * self.size, self.rows))

    def _check_recipes(self, summaries: list[dict[str, Any]]) -> None:
        # a finished set may lack entries that later versions record
        unnoted = self.recipe if len(summaries) == len(self.names) else {}
        for found in ({**unnoted, **summary["recipe"]} for summary in summaries):
            if found != self.recipe:
                other = [f"{k} {found.get(k)}, not {v}" for k, v in self.recipe.items() if found.get(k) != v]
                raise UserError(
                    f"{self.folder} holds shards made from something else ({'; '.join(other)}): "
                    f"write data.shards=ANOTHER_FOLDER, or remove these with rm -r {self.folder}"
                )


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file} is damaged: rm -r {file.parent}, then `mixar prepare` writes it again") from None


def _unwritable(folder: Path, reason: str | None) -> UserError:
    return UserError(
        f"cannot write shards to {folder} ({reason}): write data.shards=FOLDER on a disk with space, "
        "or free some, and the same command resumes where this one stopped"
    )
