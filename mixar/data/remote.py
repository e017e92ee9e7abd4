"""The files of a set of shards, local or at a remote, each fetched once into a cache."""

import json
import shlex
import tempfile
import time
from pathlib import Path

from filelock import FileLock

from mixar.errors import PassingError, UserError
from mixar.files import replacing
from mixar.log import log

MANIFEST = "manifest.json"
PART = "part.json"  # in each part, whether the whole set is finished or not
WAITS = (1, 4, 16, 60)  # seconds between attempts at a remote that has answered before


def fetch(shards: str, cache: str | None, name: str) -> Path:
    """The local path of file `name` of a set; with a cache, the file is downloaded into it first.

    A remote that has answered before is tried again for a while, since a run should survive an outage. The file lock
    holds between the ranks and workers of a node and between unrelated jobs, and ends with the process that holds it.

    Args:
        shards: a local folder, or with `cache` any URL that streaming supports.
        cache: a local folder; each set needs its own.

    Raises:
        UserError: a URL without a cache, or a missing file.
        PassingError: a file that cannot be fetched.
    """
    if cache is None and ":/" in shards:
        raise UserError(f"data.shards={shards} is remote: write data.cache=FOLDER to keep what was read")
    path = Path(cache or shards, name)
    if path.is_file():
        return path
    if cache is None:
        verb = "`mixar prepare --pre-draw`" if "/" in name else "`mixar prepare`"
        made = _progress(path.parent, verb) or f"make the shards with {verb}, or write data.shards=FOLDER"
        raise UserError(f"{path} is missing: {made}")
    waits = list(WAITS) if Path(cache, MANIFEST).is_file() else []
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    with replacing(path) as aside:
                        _download(shards, name, aside)
            return path
        except Exception as error:  # each kind of storage has its own errors
            failed = f"cannot fetch {shards.rstrip('/')}/{name} to {path} ({error})"
            if not waits:
                raise PassingError(f"{failed}: check data.shards and data.cache") from None
            log.warning("%s, trying again in %g s", failed, waits[0])
            time.sleep(waits.pop(0))


def _progress(folder: Path, verb: str) -> str:
    """The progress of `verb` with the set in `folder`; empty where it wrote nothing."""
    if not (written := sorted(folder.glob(f"part-*/{PART}"))):
        return ""
    whole = json.loads(written[0].read_text()).get("parts", "more")
    return f"{len(written)} of {whole} parts are written, run {verb} again with the same arguments for the rest"


def _download(shards: str, name: str, to: Path) -> None:
    from streaming.base.storage import CloudDownloader  # takes seconds to import, and only remote files need it

    CloudDownloader.direct_download(f"{shards.removeprefix('file://').rstrip('/')}/{name}", str(to))


def check_cache(shards: str, cache: str | None) -> None:
    """Refuse the cache of a remote set that has been made again since.

    A remote that does not answer is taken as unchanged, since the cache may hold everything that is needed.

    Raises:
        UserError: the remote's index differs from the cached one.
    """
    kept = Path(cache or shards, "index.json")
    if cache is None or not kept.is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            _download(shards, kept.name, Path(folder, kept.name))
        except Exception as error:  # each kind of storage has its own errors
            log.warning("%s cannot be compared with its cache (%s)", shards, error)
            return
        if Path(folder, kept.name).read_bytes() != kept.read_bytes():
            raise UserError(
                f"{shards} was made again since it was cached: rm -r {shlex.quote(cache)}, then it is fetched again"
            )
