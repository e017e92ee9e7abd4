"""Kill ranks of real runs at random moments, again and again, and see that nothing is lost but the last few steps.

    python -m tests.chaos --kills 20 --engine fsdp

A run is started, one of its ranks is killed (SIGKILL), in every third start as soon as a checkpoint is being written;
the others end as a launcher would end them; the run is started again, until all kills are spent and it reaches its end.
Then every loss that it logged must equal, in every digit, that of a run which nobody disturbed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mixar.checkpoint import complete_checkpoints
from tests.home import make_home, rank_environments

STEPS, CHECKPOINT_EVERY = 160, 4
TIMES = ("images_per_second", "data_wait", "time")


@dataclass
class Summary:
    kills: int = 0
    while_writing: int = 0  # those that came while a checkpoint was being written
    resumes: int = 0
    lost_steps: int = 0  # trained a second time, in all
    most_lost: int = 0  # after one kill
    divergent_losses: int = 0


def overrides(run: Path, engine: str) -> list[str]:
    return [
        f"run_dir={run}", f"engine.name={engine}", f"train.epochs={STEPS / 4}", "train.log_every=1", "train.keep=2",
        f"train.checkpoint_every={CHECKPOINT_EVERY / 4}", "engine.timeout=60",
    ]  # fmt: skip


def fork_ranks(config: Path, run: Path, engine: str, world: int) -> list[int]:
    """Start a run as `world` ranks, forked from this process, which has imported what they need: their process ids."""
    pids = []
    for place in rank_environments(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                torch.set_num_threads(1)  # a fork's thread pool is made at this call: two threads racing to it abort
                os.environ.update(place)
                log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                from mixar.train import add_arguments
                from mixar.train import run as train

                parser = argparse.ArgumentParser()
                add_arguments(parser)
                train(parser.parse_intermixed_args([str(config), *overrides(run, engine)]))
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def wait(pids: list[int], seconds: float) -> bool:
    """Wait for all to end, the others killed once one has failed; whether all succeeded."""
    left, succeeded, limit = set(pids), True, time.monotonic() + seconds
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                succeeded = succeeded and status == 0
        if (not succeeded or time.monotonic() > limit) and left:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            succeeded = False
        time.sleep(0.01)
    return succeeded


def logged(run: Path) -> list[dict]:
    """The records of a run, without what a clock gave and without a last line that a kill tore."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found.append({name: value for name, value in record.items() if name not in TIMES})
    return found


def tail(run: Path) -> str:
    return "\n".join(run.with_suffix(".log").read_text().splitlines()[-40:])


def disturb(pids: list[int], run: Path, chance: random.Random, while_writing: bool) -> bool:
    """Kill a rank: after a while, or when a checkpoint begins. Whether one was being written."""
    victim, begun = chance.choice(pids), len(logged(run))
    patience = chance.uniform(0.2, 1.2)
    started = None  # the first step of this start
    while True:
        if started is None and len(logged(run)) != begun:
            started = time.monotonic()
        writing = any((run / "checkpoints").glob(".*.partial"))
        late = started is not None and time.monotonic() - started > patience
        if (writing and while_writing and started is not None) or (late and not while_writing):
            break
        if os.waitpid(victim, os.WNOHANG)[0]:
            raise SystemExit(f"a rank ended by itself:\n{tail(run)}")
        time.sleep(0.001)
    os.kill(victim, signal.SIGKILL)
    return writing


def chaos(root: Path, engine: str, kills: int, world: int, seed: int) -> Summary:
    """Run the whole story; raises where a start fails that nobody disturbed."""
    chance, config = random.Random(seed), root / "config.yaml"
    whole, killed = root / f"whole-{engine}", root / f"killed-{engine}"
    if not wait(fork_ranks(config, whole, engine, world), 600):
        raise SystemExit(f"the undisturbed run failed:\n{tail(whole)}")
    summary = Summary()
    while summary.kills < kills:
        done = max((record["step"] for record in logged(killed)), default=0)
        if done > 0.7 * STEPS:  # room for kills: the same run again, from its first checkpoints on
            shutil.rmtree(killed)
            done = 0
        kept = complete_checkpoints(killed)
        if kept:
            summary.resumes += 1
        lost = done - (int(kept[-1].name) // 16 if kept else 0)
        summary.lost_steps, summary.most_lost = summary.lost_steps + lost, max(summary.most_lost, lost)
        pids = fork_ranks(config, killed, engine, world)
        writing = disturb(pids, killed, chance, while_writing=summary.kills % 3 == 0)
        wait(pids, 0 if world == 1 else 5)
        summary.kills, summary.while_writing = summary.kills + 1, summary.while_writing + writing
        print(f"kill {summary.kills}: at step {len(logged(killed))}{', while writing' * writing}", flush=True)
    summary.resumes += 1
    if not wait(fork_ranks(config, killed, engine, world), 600):
        raise SystemExit(f"the run did not reach its end:\n{tail(killed)}")
    expected, found = logged(whole), logged(killed)
    summary.divergent_losses = sum(a != b for a, b in zip(expected, found)) + abs(len(expected) - len(found))
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--engine", default="fsdp", help="ddp, fsdp, hsdp, zero1, zero2 or zero3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import mixar.train  # noqa: F401 - before the forks, so that a start takes no seconds

    torch.set_num_threads(1)  # a process that has started threads cannot be forked
    with tempfile.TemporaryDirectory() as folder:
        make_home(Path(folder))
        summary = chaos(Path(folder), args.engine, args.kills, args.ranks, args.seed)
    print(json.dumps({"engine": args.engine, "ranks": args.ranks, **asdict(summary)}))
    return 1 if summary.divergent_losses else 0


if __name__ == "__main__":
    sys.exit(main())
