"""Preparation of a network's blocks before it is sharded: activation recomputation, then compilation."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixar.config import EngineConfig


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The modules that are compiled and sharded one by one, as the network's `blocks` lists them."""
    declared: Callable[[], dict[str, list[nn.Module]]] = getattr(network, "blocks", dict)
    return [module for modules in declared().values() for module in modules]


def prepare_blocks(network: nn.Module, cfg: EngineConfig, device: torch.device, zero3: bool = False) -> None:
    """Set up recomputation and compilation as `cfg` says.

    Only `forward` is replaced, so that parameter names do not change, and the hooks of sharding stay out of the graph.
    """
    declared: Callable[[], dict[str, list[nn.Module]]] = getattr(network, "recomputed", dict)
    for part, modules in declared().items():
        for module in modules if cfg.recompute in (part, "all") else ():
            module.forward = _recomputing(module.forward)  # type: ignore[method-assign]
    gpu = device.type == "cuda"
    if cfg.compiles(gpu, zero3):
        options: dict[str, Any] = {"combo_kernels": True} if gpu else {}  # small ones in one launch
        for module in blocks_of(network):
            # not as one graph or an error: a run whose shapes change too often goes on without compilation
            compiled = torch.compile(module.forward, dynamic=False, options=options)
            module.forward = compiled  # type: ignore[method-assign]


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run
