"""Files and folders that appear complete or not at all: they are on the disk before they get their name."""

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mixar.errors import UserError

LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of locking on a file system without locks
PART = ".part"  # suffix of files that are being written; they may be left after a kill


def try_writing(folder: str | Path) -> Path:
    """Try to write in `folder`, or in its nearest existing parent, and return that folder; leaves no file behind.

    Raises:
        OSError: the path in its `filename` is not a folder or is not writable.
    """
    place = Path(folder).absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return nearest
    except OSError as error:  # it names the temporary file
        raise OSError(error.errno, error.strerror, str(nearest)) from None


def check_writable(file: Path) -> None:
    """Check that `file` can be written, before hours are spent on its contents. Leaves nothing behind.

    Raises:
        UserError: it cannot be written, or is a folder.
    """
    try:
        try_writing(file.parent)
        taken = file.is_dir()
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}): choose a folder that you may write to") from None
    if taken:
        raise UserError(f"cannot write {file}, which is a folder: name a file")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """The path of a temporary file beside `path`, which replaces it when the block ends without an error.

    If two processes write the same file, the complete file of the later one remains.

    Raises:
        UserError: the place is not writable, or the disk is full; an existing file is unchanged.
    """
    target = Path(path)
    part = _aside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        part.replace(target)
        sync(target.parent)
    except OSError as error:
        raise _unwritable(target, part, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def creating_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `path`, which gets that name when the block ends without an error.

    Args:
        replace: replace an existing folder, once the new one is complete.

    Raises:
        UserError: `path` exists and is not to be replaced, the place is not writable, or the disk is full.
    """
    target = Path(path)
    if target.exists() and not replace:
        raise UserError(f"{target} exists and is never overwritten: remove it, or name another folder")
    part, old = _aside(target), _aside(target)
    try:
        part.mkdir(parents=True)
        yield part
        put_in_place(part, target, old)
    except OSError as error:
        raise _unwritable(target, part, error) from error
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def put_in_place(part: Path, target: Path, old: Path) -> None:
    """Write the folder `part` to the disk and rename it to `target`, an existing one to `old`. Raises OSError."""
    sync(*(Path(folder, name) for folder, _, names in os.walk(part) for name in ["", *names]))
    if target.exists():
        target.rename(old)
    part.rename(target)
    sync(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text, which has the old or the new content at any time. Raises UserError as `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON in ASCII, which every locale can read. Raises UserError as `replacing`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(*paths: Path) -> None:
    """Write files, and the entries of folders, through to the disk. Raises OSError."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _aside(target: Path) -> Path:
    # a rank on another host may have the same process id; the start of the name is enough to recognise the target
    return target.with_name(f".{target.name[:64]}.{uuid.uuid4().hex}{PART}")


def _unwritable(target: Path, part: Path, error: OSError) -> Exception:
    """The error to raise for `error`: itself if it is about another file, which the block was reading."""
    own = (None, *map(str, (part, target, *target.parents)))
    if error.filename not in own and not str(error.filename).startswith(f"{part}/"):
        return error
    return UserError(
        f"cannot write {target} ({error.strerror}): free space there, or name a place that you may write to; "
        "existing files are unchanged"
    )
