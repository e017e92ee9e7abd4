"""Labelled images in a folder, with classes from its sub-folders or from a csv."""

import csv
import errno
import os
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from mixar.data.image_set import ImageSet
from mixar.data.pixels import SUFFIXES
from mixar.errors import UserError

# made by network disks, archives and file systems; names with a leading dot are skipped as well
FOREIGN = {"@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
MOST_CLASSES = 1_000_000  # a larger number in a csv is not a label


def from_folder(folder: Path) -> ImageSet:
    """The images below `folder`, whose sub-folders are the classes. Links are followed, hidden names are skipped.

    Classes are sorted as text, as torchvision's ImageFolder sorts them, but by number where all names are numbers.

    Raises:
        UserError: no images, images beside the class folders, or a folder that cannot be read.
    """
    walk = _Walk(folder)
    if not walk.files:
        left_out = ImageSet([], [], [], [], walk.skipped).left_out()
        expected = f"expected files ending in {' '.join(sorted(SUFFIXES))}"
        raise UserError(f"no images in {folder}: {expected}{left_out and f'; {left_out}'}")
    names = [unicodedata.normalize("NFC", _text(parts[0])) if len(parts) > 1 else "" for parts in walk.files]
    classes = sorted(set(names))
    if classes[0] == "" and len(classes) > 1:
        raise UserError(
            f"{folder} has images beside its class folders, such as {_text(*walk.files[names.index('')])}: "
            "move them into a class folder, or name every label with data.labels=FILE.csv"
        )
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    index = {name: label for label, name in enumerate(classes)}
    labelled = sorted((index[name], parts) for name, parts in zip(names, walk.files))
    return ImageSet(
        [name or folder.name or folder.resolve().name for name in classes],
        [label for label, _ in labelled],
        [_text(*parts) for _, parts in labelled],
        [folder.joinpath(*parts) for _, parts in labelled],
        walk.skipped,
    )


class _Walk:
    """The images below a folder, each as the parts of its path, and the skipped names by reason, as in `ImageSet`."""

    def __init__(self, folder: Path):
        self.files: list[tuple[str, ...]] = []
        self._left_out: dict[str, list[str]] = defaultdict(list)
        self._enter(folder, (), [])

    @property
    def skipped(self) -> dict[str, list[str]]:
        return dict(sorted(self._left_out.items()))

    def _enter(self, folder: Path, parts: tuple[str, ...], above: list[tuple[int, int]]) -> None:
        """Walk through `folder`, at `parts` below the first one; `above` identifies the folders on the way to it."""
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                self._left_out["links in a circle"].append(_text(*parts))
                return
            before = len(self.files)
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    self._take(folder, (*parts, entry.name), entry, [*above, here])
            if len(parts) == 1 and len(self.files) == before:
                self._left_out["folders without images"].append(_text(*parts))
        except OSError as error:  # without it, all later classes would get other labels
            raise UserError(
                f"{error.filename or folder} cannot be read ({error.strerror}): "
                "make it readable, or remove it from the images' folder"
            ) from None

    def _take(self, folder: Path, parts: tuple[str, ...], entry: os.DirEntry, above: list[tuple[int, int]]) -> None:
        kind, suffix = _kind(entry), Path(entry.name).suffix.lower()
        if entry.name.startswith(".") or entry.name in FOREIGN:
            self._left_out["hidden"].append(_text(*parts))
        elif kind == "folder":
            self._enter(folder / entry.name, parts, above)
        elif not kind and len(parts) == 1 and entry.is_symlink() and suffix not in SUFFIXES:
            raise FileNotFoundError(errno.ENOENT, "it links to nothing", str(folder / entry.name))  # it may be a class
        elif not kind:
            self._left_out["broken links or devices"].append(_text(*parts))
        elif suffix not in SUFFIXES:
            self._left_out[suffix or "without a suffix"].append(_text(*parts))
        else:
            self.files.append(parts)


def _kind(entry: os.DirEntry) -> str:
    """`folder` or `file`, for a link that of its target; empty for a broken link and for a device."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return ""


def _text(*parts: str) -> str:
    """The parts of a path as text; bytes that are not UTF-8 become escapes, which every file can hold."""
    return os.fsencode("/".join(parts)).decode("utf-8", "backslashreplace")


def from_csv(folder: Path, table: Path) -> ImageSet:
    """The images in `folder` that a csv of `file,label` rows names, with or without that header.

    Labels that are numbers are taken as they are; names are numbered in alphabetical order.

    Raises:
        UserError: a csv that cannot be read, rows of another form, or missing files.
    """
    keys, names = _rows(table)
    missing = [key for key in keys if not (folder / key).is_file()]
    if missing:
        raise UserError(
            f"{table} names {len(missing)} files that are not in {folder}: {', '.join(missing[:3])}; "
            "paths are relative to data.images"
        )
    if all(name.isdecimal() for name in names):
        labels = [int(name) for name in names]
        classes = [str(label) for label in range(max(labels) + 1)]
    else:
        classes = sorted(set(names))
        index = {name: label for label, name in enumerate(classes)}
        labels = [index[name] for name in names]
    return ImageSet(classes, labels, keys, [folder / key for key in keys])


def _rows(table: Path) -> tuple[list[str], list[str]]:
    """The files and the labels of a csv, each row checked."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"data.labels={table} cannot be read ({error.strerror}): write the path of a csv") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"data.labels={table} is not a csv in UTF-8 ({error}): save it as one, or convert it, "
            "for example with `iconv -f LATIN1 -t UTF-8`"
        ) from None
    if rows and [cell.lower() for cell in rows[0]] == ["file", "label"]:
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if not rows or wrong:
        raise UserError(f"{table}: expected rows of `file,label`, found {','.join(wrong) if wrong else 'none'}")
    for file_name, label in rows:
        if fault := _fault(file_name, label):
            raise UserError(f"{table}: the row `{file_name},{label}` {fault}")
    keys = [PurePosixPath(file_name).as_posix() for file_name, _ in rows]
    key, times = Counter(keys).most_common(1)[0]
    if times > 1:
        labels = ", ".join(label for row_key, (_, label) in zip(keys, rows) if row_key == key)
        raise UserError(f"{table} has {times} rows for {key}, with the labels {labels}: keep one row per file")
    return keys, [unicodedata.normalize("NFC", label) for _, label in rows]


def _fault(file_name: str, label: str) -> str | None:
    path = PurePosixPath(file_name)
    if path.is_absolute() or ".." in path.parts:
        return "leads out of the folder: write the path relative to data.images"
    if not label:
        return "has no label: write one, or remove the row"
    if label.isdecimal() and float(label) >= MOST_CLASSES:
        return f"has too large a number for a label: labels count from 0, and {MOST_CLASSES:,} is the limit"
    if re.fullmatch(r"[-+]?\d+\.?\d*", label) and not label.isdecimal():
        return "has a label that is neither a name nor a whole number of at least 0: write 3, not 3.0 or -3"
    return None
