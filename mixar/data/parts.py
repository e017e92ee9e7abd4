"""A set of MDS shards written in parts, so that ranks share the work and an interrupted run goes on where it stopped.

Layout: `part-00000/{shard.00000.mds, ..., index.json, part.json}`, ..., and a root `index.json` over all parts.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter
from tqdm import tqdm

from mixar.errors import UserError
from mixar.files import write_json

HASH = "xxh3_64"
RowsOf = Callable[[range, dict[str, Any]], Iterator[dict[str, Any]]]


class Parts:
    """The parts of one set. Part p holds rows p * size to (p + 1) * size and is written by rank p % world.

    Args:
        folder: a local folder, created when it is missing.
        recipe: what the rows are made from, plain values; every part remembers it.
        rows: of the whole set, rows that turn out broken included.
        size: rows a part.

    Raises:
        UserError: a folder that cannot be written, or one with parts of another recipe.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], rows: int, size: int):
        self.folder, self.rows, self.size = folder, rows, size
        self.recipe = {**recipe, "part_size": size}
        self.names = [f"part-{part:05d}" for part in range(-(-rows // size))]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        if present := self.summaries():
            self._check_recipe(present[0]["recipe"])

    def summaries(self) -> list[dict[str, Any]]:
        """The summaries of the finished parts, in order."""
        finished = (self.folder / name / "part.json" for name in self.names)
        return [json.loads(path.read_text()) for path in finished if path.is_file()]

    def todo(self, rank: int = 0, world: int = 1) -> list[int]:
        """The parts of `rank` that are still to be written."""
        own = range(rank, len(self.names), world)
        return [part for part in own if not (self.folder / self.names[part] / "part.json").is_file()]

    def write(self, todo: list[int], columns: dict[str, str], rows_of: RowsOf, progress: bool) -> None:
        """Write the parts `todo`; each appears complete or not at all.

        Args:
            columns: MDS encodings by column.
            rows_of: the rows of a range, in order; the summary it fills in is kept beside them.
            progress: show a bar.

        Raises:
            UserError: a folder that cannot be written, or is full.
        """
        ranges = {part: range(part * self.size, min((part + 1) * self.size, self.rows)) for part in todo}
        with tqdm(total=sum(map(len, ranges.values())), unit="img", disable=not progress) as bar:
            for part, indices in ranges.items():
                final, aside = self.folder / self.names[part], self.folder / f".{self.names[part]}.tmp"
                summary: dict[str, Any] = {"recipe": self.recipe}
                try:
                    for leftover in (aside, final):
                        shutil.rmtree(leftover, ignore_errors=True)
                    with MDSWriter(columns=columns, out=str(aside), hashes=[HASH]) as writer:
                        for row in rows_of(indices, summary):
                            writer.write(row)
                            bar.update()
                    write_json(aside / "part.json", summary)
                    aside.rename(final)
                except OSError as error:
                    raise self._unwritable(error) from None

    def close(self) -> list[dict[str, Any]] | None:
        """Write the root index and return all summaries, or None while other ranks' parts are missing.

        streaming's own merge_index would also take in the sets that lie below this folder, and is not atomic.
        """
        summaries = self.summaries()
        if len(summaries) < len(self.names):
            return None
        shards = []
        for name, summary in zip(self.names, summaries):
            self._check_recipe(summary["recipe"])
            for shard in json.loads((self.folder / name / "index.json").read_text())["shards"]:
                shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
                shards.append(shard)
        write_json(self.folder / "index.json", {"version": 2, "shards": shards})
        return summaries

    def _check_recipe(self, found: dict[str, Any]) -> None:
        if found != self.recipe:
            other = [f"{k} {found.get(k)}, not {v}" for k, v in self.recipe.items() if found.get(k) != v]
            raise UserError(
                f"{self.folder} holds shards made from something else ({'; '.join(other)}): "
                f"write data.shards=ANOTHER_FOLDER, or remove these with rm -r {self.folder}"
            )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write shards to {self.folder} ({error.strerror}): write data.shards=FOLDER of a disk with room, "
            "or make room, and the same command goes on where this one stopped"
        )

