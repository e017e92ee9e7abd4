"""Which implementation of the operators a run takes: compiled kernels where they can be had, else plain PyTorch.

`MIXAR_OPS=native` makes a missing kernel an error, `MIXAR_OPS=torch` takes plain PyTorch even so.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from mixar.log import log

LIBRARY = torch.library.Library("mixar", "FRAGMENT")  # schemas, references, gradients; compiled code adds kernels
_taken: dict[str, str] = {}  # device type to what its operators run in


def choice() -> str:
    """The value of `MIXAR_OPS`: `native`, `torch`, or the empty string.

    Raises:
        RuntimeError: another value.
    """
    asked = os.environ.get("MIXAR_OPS", "")
    if asked not in ("", "native", "torch"):
        raise RuntimeError(f"MIXAR_OPS={asked} is not known: write MIXAR_OPS=native, MIXAR_OPS=torch, or leave it out")
    return asked


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator of `LIBRARY`, which runs its reference where there is no kernel.

    Its first call on a device type is the moment to look for one: then nothing is compiled before it is needed, and a
    traced graph, which calls the operator and no Python around it, comes by here too.
    """
    name = schema.partition("(")[0]

    def without_kernel(*args: Any) -> Any:
        device = args[0].device.type
        if device in _taken:
            return reference(*args)
        load(device)
        return getattr(torch.ops.mixar, name)(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixar::{name}", fake, lib=LIBRARY)


def load(device: str) -> str:
    """Take the kernels of a device type, compiled at their first use; once a process, free afterwards.

    Call it before a process group is made, since a first build takes up to a minute.

    Returns:
        what the operators run in, in words.

    Raises:
        RuntimeError: without kernels, under `MIXAR_OPS=native`.
    """
    if device not in _taken:
        _taken[device] = _take(device)
    return _taken[device]


def _take(device: str) -> str:
    from mixar.ops.build import DEVICES, BuildError, build, status  # here, so that the module also runs as a command

    asked = choice()
    if device in DEVICES and asked != "torch":
        try:
            torch.ops.load_library(build(device))
        except (BuildError, OSError) as error:
            if asked == "native":
                raise RuntimeError(f"MIXAR_OPS=native, but there are no {device} kernels: {error}") from error
            text = f"{device} operators in plain PyTorch: {error}"
            log.warning("%s", text)
            return text
        return status(device)[1]
    return f"{device} operators in plain PyTorch"
