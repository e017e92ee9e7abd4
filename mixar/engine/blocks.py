"""Preparation of a network's blocks before it is sharded: activation recomputation, then compilation."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixar.config import EngineConfig


def blocks_of(network: nn.Module, part: str | None = None) -> list[nn.Module]:
    """The modules that are recomputed, compiled and sharded one by one, as the network's `blocks` lists them.

    Args:
        part: `backbone` or `head`; None for both.
    """
    declared: Callable[[], dict[str, list[nn.Module]]] = getattr(network, "blocks", dict)
    return [module for name, modules in declared().items() if part in (None, name) for module in modules]


def compiles(cfg: EngineConfig, device: torch.device) -> bool:
    """Whether the blocks of a run on `device` are compiled: as `engine.compile` says, or on a GPU."""
    return device.type == "cuda" if cfg.compile is None else cfg.compile


def prepare_blocks(network: nn.Module, cfg: EngineConfig, device: torch.device) -> None:
    """Set up recomputation and compilation as `cfg` says.

    Only `forward` is replaced, so that parameter names do not change, and the hooks of sharding stay out of the graph.
    """
    again = {"none": [], "backbone": ["backbone"], "head": ["head"], "all": ["backbone", "head"]}[cfg.recompute]
    recomputed = {id(module) for part in again for module in blocks_of(network, part)}
    for module in blocks_of(network):
        forward = module.forward
        if id(module) in recomputed:
            forward = _recomputing(forward)
        if compiles(cfg, device):
            # not as one graph or an error: a run whose shapes change too often goes on without compilation
            forward = torch.compile(forward, dynamic=False)
        module.forward = forward  # type: ignore[method-assign]


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run
