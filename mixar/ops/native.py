"""The choice of the operators' implementation: compiled kernels if they are available, else plain PyTorch.

`MIXAR_OPS=native` makes a missing kernel an error, `MIXAR_OPS=torch` always uses plain PyTorch.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from mixar.log import log

LIBRARY = torch.library.Library("mixar", "FRAGMENT")  # schemas, references, gradients; compiled code adds kernels
_taken: dict[str, str] = {}  # device type to the description of its operators
_compiled: set[str] = set()  # device types whose kernels this process has loaded


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
    """Define an operator of `LIBRARY`, which runs its reference if there is no kernel.

    The first call on a device type looks for a kernel, so that nothing is compiled before it is needed. A traced graph
    does so, too, although it calls only the operator and no Python around it.
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
    """Load the kernels of a device type, compiled at their first use; later calls in a process return at once.

    Call it before a process group is created, since a first build takes up to a minute.

    Returns:
        a description of the implementation.

    Raises:
        RuntimeError: there are no kernels, and `MIXAR_OPS=native`.
    """
    if device not in _taken:
        _taken[device] = _take(device)
    return _taken[device]


def has_kernels(device: str) -> bool:
    """Whether `load` has found compiled kernels for a device type. Nothing is compiled or loaded here."""
    return device in _compiled


def in_one(device: str) -> bool:
    """Whether to call an operator, rather than the composition of torch's that it stands for.

    On a CPU that is only if there are kernels already: a few numbers alone compile nothing.
    """
    return device != "cpu" or has_kernels("cpu")


def _take(device: str) -> str:
    from mixar.ops.build import DEVICES, BuildError, build, status  # here, so that the module also runs as a command

    asked = choice()
    if device in DEVICES and asked != "torch":
        try:
            torch.ops.load_library(build(device))
            _compiled.add(device)
        except (BuildError, OSError) as error:
            if asked == "native":
                raise RuntimeError(f"MIXAR_OPS=native, but there are no {device} kernels: {error}") from error
            text = f"{device} operators in plain PyTorch: {error}"
            log.warning("%s", text)
            return text
        return status(device)[1]
    return f"{device} operators in plain PyTorch"
