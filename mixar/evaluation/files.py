"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixar.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the block ends without an error.

    Raises:
        UserError: nothing can be written there.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; name a place that you may write to") from None
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
