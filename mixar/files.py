"""Files and folders that appear whole or not at all, on the disk before they have their name."""

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

LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what locking fails with on a file system without locks
PART = ".part"  # ends the name of what is being written; after a kill, it may be left


def try_writing(folder: str | Path) -> Path:
    """Write a file without a name in `folder`, or in its nearest parent that exists, and return which; leaves nothing.

    Raises:
        OSError: that place, its `filename`, is not a folder or cannot be written to.
    """
    place = Path(folder).absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return nearest
    except OSError as error:  # names the file that was tried
        raise OSError(error.errno, error.strerror, str(nearest)) from None


def check_writable(file: Path) -> None:
    """Find out whether `file` can be written, before hours are spent on what goes into it. Leaves nothing behind.

    Raises:
        UserError: it cannot, or a folder has its name.
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
    """The name of a file to write beside `path`, which takes its place when the block ends without an error.

    Of two processes that write one file, the later one's stays, whole.

    Raises:
        UserError: nothing can be written there, or the disk is full; what was there before is unchanged.
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
        replace: a folder of that name is to make room; it does once the new one is whole.

    Raises:
        UserError: `path` exists and is not to be replaced, nothing can be written there, or the disk is full.
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
    """Bring the folder `part` to the disk and name it `target`; a folder that has that name becomes `old`. OSError."""
    sync(*(Path(folder, name) for folder, _, names in os.walk(part) for name in ["", *names]))
    if target.exists():
        target.rename(old)
    part.rename(target)
    sync(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text: the old content or the new, never half of it. UserError as `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON in ASCII, which every locale reads. UserError as `replacing`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(*paths: Path) -> None:
    """Bring files, and the names in folders, to the disk. OSError where that fails."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _aside(target: Path) -> Path:
    # ranks on other hosts may have this process id; the name's start is enough to tell what it was to become
    return target.with_name(f".{target.name[:64]}.{uuid.uuid4().hex}{PART}")


def _unwritable(target: Path, part: Path, error: OSError) -> Exception:
    """What to raise for `error`: itself where it is of another file, which the block was reading."""
    own = (None, *map(str, (part, target, *target.parents)))
    if error.filename not in own and not str(error.filename).startswith(f"{part}/"):
        return error
    return UserError(
        f"cannot write {target} ({error.strerror}): make room there, or name a place that you may write to; "
        "what was there is unchanged"
    )
