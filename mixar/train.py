"""The training of a config: config -> place -> data -> objective -> trainer. The same command again resumes."""

import sys
from pathlib import Path

if not __package__:
    # started as a file, python looks for packages in this folder, but `mixar` is in its parent
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import mixar  # noqa: F401 - before torch, whose OpenMP reads variables that this sets

import argparse
import errno
import math
import os
from functools import partial

import torch
import torch.distributed as c10d

from mixar import dist, failures
from mixar.checkpoint import RunDirectory, complete_checkpoints
from mixar.command_line import verb_parser
from mixar.config import Config, check_inputs, images_per_pass, load_config, to_yaml
from mixar.data.batch import Source
from mixar.data.remote import check_cache
from mixar.engine import choose_engine
from mixar.errors import PassingError, UserError, report
from mixar.files import write_text
from mixar.log import keep_in_log, log
from mixar.model.attention import prepare_attention
from mixar.ops import load
from mixar.plan import make_plan, memory_fixes, render
from mixar.tasks import build_objective, open_data
from mixar.trainer import Stopped, Trainer


def train(cfg: Config) -> Path:
    """Train a config to its end, and return the folder of its export.

    Raises:
        UserError: a mistake that the user can fix.
        Stopped: a signal ended the run, after a checkpoint.
    """
    # a batch that cannot be divided and missing inputs are reported before anything is written
    images_per_pass(cfg, dist.find().world)
    check_inputs(cfg, resumes=bool(complete_checkpoints(Path(cfg.run_dir))))
    run: RunDirectory | None = None
    try:
        kernels = load_kernels(cfg)
        place = dist.start(cfg.engine.timeout)
        run = RunDirectory(cfg, place)
        dist.on_main(place, partial(check_cache, cfg.data.shards, cfg.data.cache))
        source, data = open_data(cfg)
        objective = build_objective(cfg, data, place.device, source)
        dist.on_main(place, objective.open)
        run.begin(data | objective.load_frozen())
        log_start(cfg, source, place)
        for line in kernels:
            log.info("%s", line)
        folder = Trainer(cfg, objective, source, place, run).run()
    except Stopped:
        raise
    except BaseException as error:
        if run is not None and failures.is_out_of_gpu_memory(error):
            failures.keep_memory_snapshot(run.path / f"memory-{run.place.rank}.pickle")
        reported = in_words(error, cfg)
        fail(reported, run)
        if reported is not error:
            raise reported from None
        raise
    finally:
        if run is not None:
            run.close()
    return folder


def in_words(error: BaseException, cfg: Config) -> BaseException:
    """`error`, or in its place one that says what is full or faulty, or that other ranks were lost."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{error.filename or cfg.run_dir} cannot be written ({error.strerror}): free space there, then the same "
            "command resumes from the last checkpoint"
        )
    if (reported := failures.in_words(error, partial(less_memory, cfg))) is not error:
        return reported
    if dist.among_others() and dist.is_loss_of_others(error):
        return PassingError(
            f"rank {c10d.get_rank()} lost the other ranks in an exchange ({str(error).splitlines()[0][:200]}): another "
            f"rank ended or hangs, and reports why above or in {cfg.run_dir}/log.txt"
        )
    return error


def less_memory(cfg: Config, gpu: bool) -> str:
    """What to write so that the run needs less memory of its GPU, or of the host; empty where nothing helps."""
    place = dist.find()
    if not gpu and place.device.type == "cuda":
        return "write a smaller data.workers"
    memory, micro = math.inf, images_per_pass(cfg, place.world)
    if place.device.type == "cuda":  # as `Card.memory`, without what CUDA and NCCL take
        memory = 0.94 * torch.cuda.get_device_properties(place.device).total_memory
    try:
        fixes = memory_fixes(cfg, place.world, choose_engine(cfg, place)[0], memory)
    except Exception:  # there may be too little memory left to reckon, and the first error is the one to report
        fixes = []
    if fixes:
        return f"write {' or '.join(fixes)}, with which it would fit by `mixar plan`'s reckoning"
    if cfg.task != "mixar" and micro > 1:  # which is not planned
        return f"write train.micro_batch={micro // 2}"
    return "take GPUs with more memory, or more of them with engine.name=fsdp" if gpu else ""


def fail(error: BaseException, run: RunDirectory | None) -> None:
    """Report an error. With other ranks this process ends here, since they may be waiting for it in a collective."""
    keep_in_log(error)
    _report_outcome(error, run)
    if dist.among_others():
        status = report("mixar train", error)
        if run is not None:
            run.close()
        dist.end(status)


def load_kernels(cfg: Config) -> list[str]:
    """Load the kernels of a run, and return a line about each.

    This is called before the ranks join: the first build of the operators takes up to a minute, too long to wait in a
    collective. On each node one rank builds, and the others wait for its file.

    Raises:
        UserError: `model.attention` needs another card or a package.
    """
    device = dist.find().device
    attention = [prepare_attention(cfg.model.attention, device)] if cfg.task == "mixar" else []
    return [*attention, load(device.type)]  # each task draws random numbers


def log_start(cfg: Config, source: Source, place: dist.Place) -> None:
    """Log the device, the engine, the batch, the precision and the plan of the run."""
    engine, why = choose_engine(cfg, place)
    micro = images_per_pass(cfg, place.world)
    log.info("training %s on %s, in %s", cfg.task, place.device, cfg.run_dir)
    log.info("engine %s, for %s; %d ranks on %d nodes, started by %s", engine, why, place.world, place.nodes,
             place.launcher)  # fmt: skip
    log.info("batch %d = %d per pass x %d ranks x %d passes", cfg.train.batch, micro, place.world,
             cfg.train.batch // (micro * place.world))  # fmt: skip
    if micro < (cfg.train.micro_batch or micro):
        log.info("train.micro_batch=%d is the most per pass: %d divide the %d images of each rank",
                 cfg.train.micro_batch, micro, cfg.train.batch // place.world)  # fmt: skip
    log.info("%s", precision_table(cfg))
    log.info("%s", render(make_plan(cfg, sum(source.shard_sizes))))


def precision_table(cfg: Config) -> str:
    """The number formats of storage, computation and communication."""
    compute = "bfloat16 under autocast" if cfg.train.precision == "bf16" else "float32"
    rows = {
        "weights, gradients, moments, EMA": "float32, also when sent between ranks",
        "matrix products, attention": compute,
        "norms, diffusion, loss": "float32",
    }
    return "precision\n" + "\n".join(f"  {what:<34}{kind}" for what, kind in rows.items())


def run(args: argparse.Namespace) -> None:
    overrides = args.overrides + ["trust_pickle=true"] * args.trust_pickle
    if args.dry_run:
        if dist.find().is_main:
            cfg = load_config(args.config, overrides)
            print(to_yaml(cfg) + render(make_plan(cfg)))
            check_inputs(cfg, resumes=bool(complete_checkpoints(Path(cfg.run_dir))))
        return
    status = 0
    try:
        train(load_config(args.config, overrides))
        _report_outcome(None)
    except Stopped as stop:
        _report_outcome(stop)
        status = stop.status
    except UserError as error:
        _report_outcome(error)
        raise
    among_others = dist.among_others()
    dist.leave()
    if among_others:
        dist.end(status)  # with DeepSpeed, an interpreter that shuts down aborts now and then, after all work is done
    if status:
        sys.exit(status)


def _report_outcome(end: BaseException | None, run: RunDirectory | None = None) -> None:
    """Report to the job script how the run ended: done, stopped, refused for a mistake of the user, or failed.

    It is reported in a file, since launchers change the exit statuses of their processes. After a temporary error
    nothing is written, and the script starts the run again. It also does so after a failure, unless that occurs again
    and again at the same place, which is the last checkpoint.
    """
    file = os.environ.get("MIXAR_OUTCOME")
    if file is None or isinstance(end, PassingError) or (isinstance(end, UserError) and end.status != UserError.status):
        return
    if isinstance(end, UserError | SystemExit):
        write_text(file, "refused\n")
    elif isinstance(end, Exception):
        kept = [] if run is None else run.checkpoints()
        write_text(file, f"failed {int(kept[-1].name) if kept else 0}\n")
    elif dist.find().is_main:
        write_text(file, "done\n" if end is None else "stopped\n")


def main() -> None:
    try:
        args = verb_parser("train").parse_intermixed_args()
    except SystemExit as end:  # after --help or a wrong flag
        if end.code:
            _report_outcome(end)
        raise
    try:
        run(args)
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(report("mixar train", error))


if __name__ == "__main__":
    main()
