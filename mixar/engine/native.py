"""The engines of torch itself: replicated weights (DDP, or a single process), and FSDP2, flat or hybrid."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mixar import dist
from mixar.config import Config
from mixar.dist import Place
from mixar.engine.base import MOMENTS, Engine, Trainable
from mixar.engine.blocks import blocks_of, prepare_blocks
from mixar.engine.optim import build_optimizer
from mixar.engine.slices import Slice


class NativeEngine(Engine):
    """The step that DDP and FSDP2 share. AdamW works on this rank's slices, however they are cut."""

    def __init__(self, cfg: Config, task: Trainable, place: Place) -> None:
        super().__init__(cfg, task, place)
        with torch.device("meta"):  # memory is allocated only for this rank's shards
            network = task.build()
        prepare_blocks(network, cfg.engine, place.device)
        self._shard(network)
        network.to_empty(device=place.device)
        self.network = network
        self.model = self._replicate(network)
        self.buffers = dict(network.named_buffers())
        self.parameters: dict[str, Any] = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        pieces = {name: self._slice(p) for name, p in self.parameters.items()}
        self.slices = {name: piece for name, piece in pieces.items() if len(piece.flat)}
        flats = {name: piece.flat for name, piece in self.slices.items()}
        self.optimizer = build_optimizer(flats, cfg.optim, lambda name: task.decays(name, self.parameters[name]))
        # Adam's state exists from the start, so that a checkpoint can be read into it
        for flat in flats.values():
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=place.device), **zeros}
        self.moments = {m: {name: self.optimizer.state[f][m] for name, f in flats.items()} for m in MOMENTS}
        self._begin(task)

    def _shard(self, network: nn.Module) -> None:
        """Shard the network, which is still on the meta device."""

    def _replicate(self, network: nn.Module) -> nn.Module:
        """The module to call in a step, wrapped so that the gradients are averaged over the ranks."""
        return network

    def _slice(self, p: Tensor) -> Slice:
        """This rank's share of a parameter."""
        return Slice(p.shape, 0, p.detach().view(-1))

    def _backward(self, loss: Tensor, count: int) -> None:
        (loss / count).backward()

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        norm = self._clip()
        finite = (torch.isfinite(norm) & torch.isfinite(loss)).float()
        # the optimizer changes nothing if `found_inf` is set
        self.optimizer.grad_scale, self.optimizer.found_inf = None, 1 - finite  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.network.zero_grad(set_to_none=True)
        return norm, finite

    def _clip(self) -> Tensor:
        """Pass the gradients to the optimizer's slices and clip them; the norm over all parameters before clipping."""
        gradients = []
        for name, piece in self.slices.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                whole = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                piece.flat.grad = whole.reshape(-1)
                gradients.append(piece.flat.grad)
        norm = torch.nn.utils.get_total_norm(gradients).to(self.place.device)
        if self.peers is not None:
            norm = self._sum_over_slices(norm.square()).sqrt()
        if self.cfg.optim.clip:
            clipped = [piece.flat for piece in self.slices.values()]
            torch.nn.utils.clip_grads_with_norm_(clipped, self.cfg.optim.clip, norm)
        return norm

    def _publish(self) -> None:
        for state in self.optimizer.state.values():  # the weights share their memory with the slices
            state["step"].copy_(self.updates.squeeze())


class ReplicatedEngine(NativeEngine):
    """Every rank holds all weights: DDP, or a single process."""

    def _replicate(self, network: nn.Module) -> nn.Module:
        if self.place.world == 1:
            return network
        self.copies = (self.place.rank, self.place.world)
        device = [self.place.device] if self.place.device.type == "cuda" else None
        # nothing to broadcast: the initial weights are the same function of seed and name on all ranks
        return DistributedDataParallel(
            network, device, gradient_as_bucket_view=True, init_sync=False, broadcast_buffers=False
        )

    def _micro_batch(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.place.world == 1 else self.model.no_sync()  # type: ignore[operator]


class FSDPEngine(NativeEngine):
    """FSDP2: weights, gradients, moments and EMA sharded over all ranks, or within a node and replicated across nodes.

    They are communicated as float32, so that norms and embeddings use the same weights as with the other engines.
    """

    def __init__(self, cfg: Config, task: Trainable, place: Place, hybrid: bool) -> None:
        self.hybrid = hybrid
        super().__init__(cfg, task, place)

    def _shard(self, network: nn.Module) -> None:
        place = self.place
        dist.join(place, self.cfg.engine.timeout)
        if self.hybrid:
            shape = (place.nodes, place.local_world)
            mesh = init_device_mesh(place.device.type, shape, mesh_dim_names=("node", "rank"))
            self.copies, self.peers = (place.rank // place.local_world, place.nodes), mesh.get_group("rank")
        else:
            mesh = init_device_mesh(place.device.type, (place.world,), mesh_dim_names=("rank",))
            self.peers = mesh.get_group("rank")
        for module in blocks_of(network):
            # within a node, gathering once per step costs memory and saves half of the traffic
            fully_shard(module, mesh=mesh, reshard_after_forward=not self.hybrid)
        fully_shard(network, mesh=mesh)

    def _slice(self, p: Tensor) -> Slice:
        rows, row = p.shape[0], p.shape[1:].numel()
        share = -(-rows // c10d.get_world_size(self.peers))  # as torch.chunk cuts
        first = min(c10d.get_rank(self.peers) * share, rows)
        return Slice(p.shape, first * row, cast(DTensor, p.detach()).to_local().view(-1))

    def _micro_batch(self, last: bool) -> AbstractContextManager:
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(last)
        self.network.set_is_last_backward(last)
        return nullcontext()
