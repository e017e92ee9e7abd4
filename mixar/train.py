"""Train what a config describes: config -> place -> data -> objective -> trainer. The same command again resumes."""

import sys
from pathlib import Path

if not __package__:
    # started as a file, python looks for packages in this folder, where `mixar` is not; look beside it instead
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import mixar  # noqa: F401 - before torch, whose OpenMP reads what this sets

import argparse
import errno
import os
from functools import partial

import torch.distributed as c10d

from mixar import dist
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
from mixar.objectives import MixARObjective
from mixar.ops import load
from mixar.plan import make_plan, render
from mixar.tasks import build_objective, open_data
from mixar.trainer import Stopped, Trainer


def train(cfg: Config) -> Path:
    """Run a config to its end; returns the folder of its export.

    Raises:
        UserError: what the user can mend.
        Stopped: a signal ended it, after a checkpoint.
    """
    # what cannot be divided, and what is not there, is told before anything is written
    images_per_pass(cfg, dist.find().world)
    check_inputs(cfg, resumes=bool(complete_checkpoints(Path(cfg.run_dir))))
    kernels = load_kernels(cfg)
    run: RunDirectory | None = None
    try:
        place = dist.start(cfg.engine.timeout)
        run = RunDirectory(cfg, place)
        dist.on_main(place, partial(check_cache, cfg.data.shards, cfg.data.cache))
        source, data = open_data(cfg)
        objective = build_objective(cfg, data, place.device, source)
        dist.on_main(place, objective.open)
        if isinstance(objective, MixARObjective) and objective.prior is not None:
            data["prior"] = objective.frozen.fingerprints["prior"]  # TI-Mix draws from it
        run.begin(data)
        tell_start(cfg, source, place)
        for line in kernels:
            log.info("%s", line)
        folder = Trainer(cfg, objective, source, place, run).run()
    except Stopped:
        raise
    except BaseException as error:
        told = in_words(error, cfg)
        fail(told, run)
        if told is not error:
            raise told from None
        raise
    finally:
        if run is not None:
            run.close()
    return folder


def in_words(error: BaseException, cfg: Config) -> BaseException:
    """`error`, or what it tells the user where it means a full disk, or other ranks that have ended."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{error.filename or cfg.run_dir} cannot be written ({error.strerror}): make room there, then the same "
            "command goes on from the last checkpoint"
        )
    if dist.among_others() and dist.is_loss_of_others(error):
        return PassingError(
            f"rank {c10d.get_rank()} lost the other ranks in an exchange ({str(error).splitlines()[0][:200]}): another "
            f"rank ended or hangs, and tells why above or in {cfg.run_dir}/log.txt"
        )
    return error


def fail(error: BaseException, run: RunDirectory | None) -> None:
    """Tell of an error. Among other ranks this process ends here: they may be waiting for it where no error reaches."""
    keep_in_log(error)
    _tell(error, run)
    if dist.among_others():
        status = report("mixar train", error)
        if run is not None:
            run.close()
        dist.end(status)


def load_kernels(cfg: Config) -> list[str]:
    """Take what a run's kernels are found in, and say in words what that is.

    Before the ranks join: the first build of the operators takes up to a minute, in which no rank may wait in a
    collective. On each node one rank builds, and the others wait for its file.

    Raises:
        UserError: `model.attention` needs another card or a package.
    """
    if cfg.task != "mixar":
        return []
    device = dist.find().device
    return [prepare_attention(cfg.model.attention, device), load(device.type)]


def tell_start(cfg: Config, source: Source, place: dist.Place) -> None:
    """Log where and how the run will be computed, and how long it is."""
    engine, why = choose_engine(cfg, place)
    micro = images_per_pass(cfg, place.world)
    log.info("training %s on %s, in %s", cfg.task, place.device, cfg.run_dir)
    log.info("engine %s, for %s; %d ranks on %d nodes, started by %s", engine, why, place.world, place.nodes,
             place.launcher)  # fmt: skip
    log.info("batch %d = %d a pass x %d ranks x %d passes", cfg.train.batch, micro, place.world,
             cfg.train.batch // (micro * place.world))  # fmt: skip
    log.info("%s", precision_table(cfg))
    log.info("%s", render(make_plan(cfg, sum(source.shard_sizes))))


def precision_table(cfg: Config) -> str:
    """What is kept, computed and sent in which format."""
    compute = "bfloat16 under autocast" if cfg.train.precision == "bf16" else "float32"
    rows = {
        "weights, gradients, moments, EMA": "float32, also on their way between ranks",
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
    try:
        train(load_config(args.config, overrides))
        _tell(None)
    except Stopped as stop:
        _tell(stop)
        if stop.status:
            sys.exit(stop.status)
    except UserError as error:
        _tell(error)
        raise
    dist.leave()


def _tell(end: BaseException | None, run: RunDirectory | None = None) -> None:
    """Tell the job script that started this how it ended: done, stopped, refused for a mistake of the user, or failed.

    By a file, since a launcher makes of the exit statuses of its processes what it likes. Of what may pass it says
    nothing: the script starts it again. Likewise after a failure, unless it comes again and again at the same place,
    which is the last checkpoint.
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
    except SystemExit as end:  # after --help, or of a wrong flag
        if end.code:
            _tell(end)
        raise
    try:
        run(args)
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(report("mixar train", error))


if __name__ == "__main__":
    main()
