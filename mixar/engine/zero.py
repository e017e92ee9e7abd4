"""DeepSpeed's ZeRO, which partitions the moments (stage 1), also the gradients (2), also the weights (3)."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from mixar import dist
from mixar.config import Config, images_per_pass
from mixar.dist import Place
from mixar.engine.base import MOMENTS, Engine, StepInfo, Trainable
from mixar.engine.blocks import prepare_blocks
from mixar.engine.optim import build_optimizer
from mixar.engine.slices import Slice
from mixar.errors import UserError
from mixar.files import write_json

SETTINGS = "deepspeed.json"  # DeepSpeed's configuration, in the run directory


def deepspeed_settings(cfg: Config, stage: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run, with the user's file at `engine.deepspeed` merged over it.

    Raises:
        UserError: the file is missing or contradicts the config.
    """
    micro = images_per_pass(cfg, world)
    ours: dict[str, Any] = {
        "train_batch_size": cfg.train.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": cfg.train.batch // (micro * world),
        "gradient_clipping": cfg.optim.clip,  # without it DeepSpeed clips at 1
        "zero_optimization": {"stage": stage},
        # weights and gradients are communicated and reduced in float32; without the empty list, in bf16
        "torch_autocast": {
            "enabled": cfg.train.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": [],
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }  # fmt: skip
    if cfg.engine.deepspeed is None:
        return ours
    file = Path(cfg.engine.deepspeed)
    try:
        theirs = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"engine.deepspeed={file} cannot be read ({error}): write the path of a JSON file") from None
    return _merged(ours, theirs, file)


# settings that follow from keys of the config: a file must not change them without a message
_DECIDED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.clip",
    "zero_optimization.stage": "engine.name",
    "torch_autocast.enabled": "train.precision",
}
_OURS = {"optimizer": "optim", "scheduler": "optim", "bf16": "train.precision", "fp16": "train.precision"}


def _merged(ours: dict[str, Any], theirs: dict[str, Any], file: Path, prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = prefix + key
        if name in _OURS:
            raise UserError(f"{file} has '{name}', which {_OURS[name]} decides: remove it, and set {_OURS[name]}")
        if value == "auto":
            continue
        if name in _DECIDED and value != ours[key]:
            raise UserError(
                f"{file} has {name}={value}, but it is {ours[key]} by the config's {_DECIDED[name]}: "
                f"set {_DECIDED[name]} on the command line, and remove {name} from the file"
            )
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        merged[key] = _merged(ours[key], value, file, f"{name}.") if both else value
    return merged


class ZeroEngine(Engine):
    """ZeRO with the AdamW and the checkpoints of the other engines, in place of DeepSpeed's own."""

    def __init__(self, cfg: Config, task: Trainable, place: Place, stage: int) -> None:
        super().__init__(cfg, task, place)
        self.stage = stage
        with _local_rank_of_card(place):
            self._build(cfg, task, place, stage)

    def step(self, batches: Sequence[Any], epoch: float, measure: bool = False) -> StepInfo:
        # in its first step, stage 3 compares the ranks' order of parameters, on the card of LOCAL_RANK
        with _local_rank_of_card(self.place):
            return super().step(batches, epoch, measure)

    def _build(self, cfg: Config, task: Trainable, place: Place, stage: int) -> None:
        settings = dist.on_main(place, lambda: deepspeed_settings(cfg, stage, place.world))
        if place.is_main:
            write_json(Path(cfg.run_dir, SETTINGS), settings)
        deepspeed = _import(place, cfg.engine.timeout)
        self.peers = c10d.group.WORLD
        if stage == 3:
            # each parameter is partitioned as soon as it exists, so that no rank ever holds the whole network
            with deepspeed.zero.Init(config_dict_or_path=settings):
                network = task.build()
        else:
            with torch.device("meta"):
                network = task.build()
            network.to_empty(device=place.device)
        prepare_blocks(network, cfg.engine, place.device, zero3=stage == 3)
        named: dict[str, Any] = {name: p for name, p in network.named_parameters() if p.requires_grad}
        shapes = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in named.items()}
        like = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        optimizer = build_optimizer(dict(named), cfg.optim, lambda name: task.decays(name, like[name]))
        self.deepspeed, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.model, self.zero = self.deepspeed, self.deepspeed.optimizer
        self.shapes = shapes
        self.buffers = dict(network.named_buffers())
        self.named = named
        self.optimizer = optimizer
        spans = self._row_spans() if stage == 3 else self._flat_spans()
        self.slices, self.moments = {}, {moment: {} for moment in MOMENTS}
        for name, (flat, offset, start, length) in spans.items():
            if flat not in optimizer.state:
                zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
                optimizer.state[flat] = {"step": torch.zeros((), device=place.device), **zeros}
            self.slices[name] = Slice(shapes[name], start, flat.detach()[offset : offset + length])
            for moment in MOMENTS:
                self.moments[moment][name] = optimizer.state[flat][moment][offset : offset + length]
        self._begin(task)

    def _row_spans(self) -> dict[str, tuple[Tensor, int, int, int]]:
        """The rank's share of each parameter in stage 3, which partitions every parameter separately.

        By name: the flat partition that holds it, the offset there, the first element of the parameter, the number.
        """
        spans = {}
        rank = self.place.rank
        for name, p in self.named.items():
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
            start = rank * p.partition_numel()
            length = min(p.partition_numel(), p.ds_numel - start)  # the last partitions are padded
            if length > 0:
                spans[name] = (self.zero.fp32_partitioned_groups_flat[group], offset, start, length)
        return spans

    def _flat_spans(self) -> dict[str, tuple[Tensor, int, int, int]]:
        """The rank's share of each parameter in stages 1 and 2, which partition all parameters of a group in one row.

        By name, as in `_row_spans`.
        """
        spans, names = {}, {id(p): name for name, p in self.named.items()}
        for group, flat in zip(self.zero.round_robin_bit16_groups, self.zero.single_partition_of_fp32_groups):
            first, begin = self.place.rank * len(flat), 0
            for p in group:
                start, end = max(begin, first), min(begin + p.numel(), first + len(flat))
                if start < end:
                    spans[names[id(p)]] = (flat, start - first, start - begin, end - start)
                begin += p.numel()
        return spans

    def _backward(self, loss: Tensor, count: int) -> None:
        self.deepspeed.backward(loss)
        self.deepspeed.step()  # updates after the last micro-batch if it is finite

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        device = self.place.device
        norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32, device=device)
        return norm, torch.full((), float(not self.zero.overflow), device=device)

    @torch.no_grad()
    def _publish(self) -> None:
        for state in self.optimizer.state.values():
            state["step"].copy_(self.updates.squeeze())
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for name, piece in self.slices.items():
            self.named[name].ds_tensor.view(-1)[: len(piece.flat)].copy_(piece.flat)


@contextmanager
def _local_rank_of_card(place: Place) -> Iterator[None]:
    """Let LOCAL_RANK be the number of this rank's card, which DeepSpeed takes it for.

    It is another one where each process sees only its own card, as with `srun --gpus-per-task=1`.
    """
    before, card = os.environ.get("LOCAL_RANK"), place.device.index
    os.environ["LOCAL_RANK"] = str(place.local_rank if card is None else card)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _import(place: Place, timeout: float) -> Any:
    """DeepSpeed, set up to use the existing process group."""
    os.environ.setdefault("DS_ACCELERATOR", place.device.type)
    dist.join(place, timeout)
    import deepspeed  # takes seconds, and only these engines need it

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # on a CPU it would compile, for a minute, a kernel that is never called
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    return deepspeed
