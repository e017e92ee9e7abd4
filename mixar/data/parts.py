"""A set of MDS shards written in parts, so that processes share the work and an interrupted one goes on from there.

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
SIZE = 1024  # rows a part: all that a kill can cost; a shard of 68 MB where images are of 256 pixels
LOCK = ".lock"  # its byte p is locked by the process that writes part p
POLL = 1  # seconds between two looks at what others still write

Row = dict[str, Any]
RowsOf = Callable[[Iterator[range]], Iterator[tuple[range, Iterator[Row], dict[str, Any]]]]


def local_folder(shards: str) -> Path:
    """The folder `shards`, which need not exist yet, before anything expensive is done for it.

    Raises:
        UserError: a remote, or a place that cannot be written to.
    """
    if ":/" in shards:
        raise UserError(f"data.shards={shards}: shards are written to a local folder, then copied to a remote")
    folder = Path(shards)
    try:
        try_writing(folder)
    except OSError as error:
        raise _unwritable(folder, f"{error.filename}: {error.strerror}") from None
    return folder


class Parts:
    """The parts of one set. Part p holds rows p * size to (p + 1) * size.

    Args:
        folder: a local folder, created when it is missing.
        recipe: what the rows are made from, plain values; every part remembers it.
        rows: of the whole set, rows that turn out broken included.
        size: rows a part; a set that is begun keeps its own.

    Raises:
        UserError: a folder that cannot be written, or one with parts of another recipe.
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
        self._lockless = False  # found out when a part is locked
        self._waiting = False  # for other processes
        self._check_recipes(self.summaries())

    def summaries(self) -> list[dict[str, Any]]:
        """The summaries of the finished parts, in order."""
        return [_read(self.folder / name / PART) for part, name in enumerate(self.names) if self._finished(part)]

    def todo(self) -> list[int]:
        """The parts that are still to be written."""
        return [part for part in range(len(self.names)) if not self._finished(part)]

    def write(self, rank: int, world: int, columns: dict[str, str], rows_of: RowsOf, progress: bool) -> None:
        """Write what is missing, beginning with each `world`-th part from `rank` on, until all is there.

        A part is written by one process at a time and appears complete or not at all. Processes share the work
        without talking to each other: each takes what nobody is writing, then waits for what others are writing, or
        takes that over when they die.

        Args:
            columns: MDS encodings by column.
            rows_of: of each range, itself, its rows in order, and the summary that they fill in, which is kept
                beside them. It may ask for ranges ahead of the rows that are taken.
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
        """The rows of each part that is nobody's, which is this process's from then on; those of `rank` first."""
        for part in sorted(self.todo(), key=lambda part: (part - rank) % world):
            if part in self._claimed or not self._lock(lock, part) or (self._lockless and part % world != rank):
                continue
            if not self._finished(part):  # by the one who held the lock
                self._claimed.add(part)
                yield self._range(part)

    def _lock(self, lock: IO[str], part: int) -> bool:
        """Whether no other process writes `part`, nor will."""
        try:
            # a lock of the process: unlike flock's, the loader's workers do not inherit it, and it ends with a kill
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
        """Give the others some time for their parts."""
        if self._lockless:
            raise PassingError(
                f"{len(self.names) - others} of {len(self.names)} parts of {self.folder} are written, the rest is left "
                "to other ranks, since the disk has no file locks by which ranks know of each other: run the same "
                "command again when they have ended, and never two with the same --rank"
            )
        if not self._waiting:
            tqdm.write(f"waiting for {others} parts of {self.folder} that others are writing", file=sys.stderr)
            self._waiting = True
        time.sleep(POLL)

    def _write_part(
        self, part: int, rows: Iterator[Row], summary: dict[str, Any], columns: dict[str, str], bar: tqdm
    ) -> None:
        final = self.folder / self.names[part]
        if final.is_dir() and not self._finished(part):  # something was taken out of it
            shutil.rmtree(final)
        for leftover in self.folder.glob(f".{final.name}.*"):  # of a process that was killed
            shutil.rmtree(leftover)
        try:
            with creating_folder(final) as aside:
                # a shard a part: unlike the end of a full one, none is small
                with MDSWriter(columns=columns, out=str(aside), hashes=[HASH], size_limit=None) as writer:
                    for row in rows:
                        writer.write(row)
                        bar.update()
                write_json(aside / PART, {"recipe": self.recipe, "parts": len(self.names), **summary})
        except UserError:
            # a disk over a network may show late what another process has finished
            if not self._finished(part):
                raise

    def close(self) -> list[dict[str, Any]]:
        """Write the root index over all parts, which are finished, and return their summaries.

        streaming's own merge_index would also take in the sets that lie below this folder, and is not atomic.
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
        # a finished set may lack what later versions note down
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
        f"cannot write shards to {folder} ({reason}): write data.shards=FOLDER of a disk with room, "
        "or make room, and the same command goes on where this one stopped"
    )
