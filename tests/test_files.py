"""Files that appear whole or not at all, whoever writes beside and whatever becomes of the writer."""

import multiprocessing
import os
from pathlib import Path

import pytest

from mixar.errors import UserError
from mixar.files import creating_folder, replacing, write_json, write_text


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    write_text(file, "old")
    with pytest.raises(ZeroDivisionError), replacing(file) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old" and os.listdir(file.parent) == ["a.txt"]


def _write(file: str, letter: str, barrier) -> None:
    for _ in range(50):
        barrier.wait()
        write_text(file, letter * 100_000)


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, file = context.Barrier(2), tmp_path / "shared"
    writers = [context.Process(target=_write, args=(str(file), letter, barrier)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert file.read_text() in ("a" * 100_000, "b" * 100_000) and os.listdir(tmp_path) == ["shared"]


def test_a_full_disk_is_told_and_loses_nothing(small_disk: Path) -> None:
    write_json(small_disk / "kept.json", [1])
    big = "x" * (64 << 20)
    with pytest.raises(UserError, match=r"cannot write .*kept\.json \(No space left on device\)"):
        write_text(small_disk / "kept.json", big)
    with pytest.raises(UserError, match="No space left"), creating_folder(small_disk / "new") as folder:
        (folder / "a").write_text(big)
    assert (small_disk / "kept.json").read_text() == "[\n  1\n]\n" and os.listdir(small_disk) == ["kept.json"]


def test_an_error_of_another_file_is_not_told_as_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a") as part:
        part.write_text((tmp_path / "elsewhere" / "missing").read_text())


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"), creating_folder(tmp_path):
        pass
    with pytest.raises(UserError, match="cannot write /proc/none"):
        write_text("/proc/none/x", "")
