"""Checks that end in every way a check can end; in a file that a process of its own can import."""

import os
import time
from collections.abc import Iterator
from typing import Any

from mixar.gpu import Finding


def good(cfg: Any, device: Any) -> Iterator[Finding]:
    yield Finding("good", "ok", "", {"pid": os.getpid()})


def raising(cfg: Any, device: Any) -> Iterator[Finding]:
    yield Finding("raising: first", "ok")
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crashing(cfg: Any, device: Any) -> Iterator[Finding]:
    yield Finding("crashing: first", "ok")
    os.abort()


def hanging(cfg: Any, device: Any) -> Iterator[Finding]:
    yield Finding("hanging: first", "ok")
    time.sleep(3600)
