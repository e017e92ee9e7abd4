"""Disturb real runs at random moments, again and again, and see that nothing is lost but the last few steps.

    python -m tests.chaos --kills 20 --engine fsdp

A run of two ranks with loader workers is started, one of these happens to it, and it is started again, until all are
spent and it reaches its end:

    kill      one rank is killed, in every third start as soon as a checkpoint is being written
    group     a signal that asks for an end goes to all ranks and their workers
    launcher  the same to the torchrun that started the ranks
    step, loader, sums   an error on one rank: in its step, in its loader's worker, in the sums of a checkpoint
    disk      the disk fills
    reader    another process reads the checkpoints all the while, and then a rank is killed

Then every loss that was logged must equal, in every digit, that of a run which nobody disturbed; what asks for an end
must have cost no step; each reason must have been told; and no rank may have waited longer than `engine.timeout`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mixar.checkpoint import complete_checkpoints
from tests.home import ROOT, free_port, make_home, rank_environments
from tests.home import records as all_records

STEPS, CHECKPOINT_EVERY, TIMEOUT = 160, 4, 60
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
SENTENCE = "a fault of chance"  # what the errors on one rank say
TOLD = {
    "group": "stopped by a signal", "launcher": "stopped by a signal", "step": SENTENCE, "loader": SENTENCE,
    "sums": SENTENCE, "disk": "No space left on device",
}  # fmt: skip
KINDS = ("kill", "group", "kill", "step", "loader", "kill", "sums", "reader", "disk", "launcher")


@dataclass
class Summary:
    faults: Counter[str] = field(default_factory=Counter)
    while_writing: int = 0  # those that came while a checkpoint was being written
    resumes: int = 0
    lost_steps: int = 0  # trained a second time, in all
    most_lost: int = 0  # after one fault
    lost_by_signals: int = 0
    untold: int = 0  # reasons that no rank told
    waits: int = 0  # starts that went on for longer than the time-out after the fault
    divergent_losses: int = 0

    @property
    def failed(self) -> bool:
        return bool(self.lost_by_signals or self.untold or self.waits or self.divergent_losses)


def overrides(run: Path, engine: str) -> list[str]:
    return [
        f"run_dir={run}", f"engine.name={engine}", f"train.epochs={STEPS / 4}", "train.log_every=1", "train.keep=2",
        f"train.checkpoint_every={CHECKPOINT_EVERY / 4}", f"engine.timeout={TIMEOUT}", "data.workers=1",
    ]  # fmt: skip


def arm(kind: str, call: int) -> None:
    """Let the `call`-th call of something that this process does fail."""
    from mixar import checkpoint
    from mixar.data.loader import ShardSource
    from mixar.errors import UserError
    from mixar.objectives import MixARObjective

    places = {"step": (MixARObjective, "loss"), "loader": (ShardSource, "read"), "sums": (checkpoint, "_sums")}
    owner, name = places[kind]
    method, count = getattr(owner, name), 0
    error = (UserError(SENTENCE), OSError(5, SENTENCE), ZeroDivisionError(SENTENCE))[call % 3]

    def fails(*args):
        nonlocal count
        count += 1
        if count == call:
            raise error
        return method(*args)

    setattr(owner, name, fails)


def fork_ranks(
    config: Path, run: Path, engine: str, world: int, log: Path, armed: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Start a run as `world` ranks in one group, forked from this process, which has imported what they need.

    Args:
        armed: called in each rank before it trains.
    """
    pids: list[int] = []
    for rank, place in enumerate(rank_environments(world)):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setpgid(0, pids[0] if pids else 0)
                torch.set_num_threads(1)  # a fork's thread pool is made at this call: two threads racing to it abort
                os.environ.update(place)
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                armed(rank)
                sys.argv = ["train", str(config), *overrides(run, engine)]
                from mixar.train import main

                main()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            finally:
                os._exit(status)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    return pids


def wait(pids: list[int], seconds: float, grace: float = 0) -> list[int] | None:
    """The statuses that all end with, the others killed a `grace` after one has failed; None beyond `seconds`."""
    statuses: dict[int, int] = {}
    begun, failed = time.monotonic(), None
    while left := [pid for pid in pids if pid not in statuses]:
        for pid in left:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = status
                failed = failed or (time.monotonic() if status else None)
        over = time.monotonic() - begun > seconds
        if over or (failed and time.monotonic() - failed > grace):
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
                statuses[pid] = os.waitpid(pid, 0)[1]
            return None if over else list(statuses.values())
        time.sleep(0.01)
    return list(statuses.values())


def logged(run: Path) -> list[dict]:
    """The records of a run, without what a clock gave."""
    found = all_records(run) if (run / "metrics.jsonl").exists() else []
    return [
        {name: value for name, value in record.items() if name != "time" and not name.startswith("speed/")}
        for record in found
    ]


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-40:])


class Story:
    """One run that things happen to."""

    def __init__(self, root: Path, engine: str, world: int, seed: int) -> None:
        self.engine, self.world, self.chance = engine, world, random.Random(seed)
        self.config, self.log, self.disk = root / "config.yaml", root / f"{engine}.log", root / f"disk-{engine}"
        self.disk.mkdir()
        small = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.disk)], capture_output=True)
        self.kinds = [kind for kind in KINDS if kind != "disk" or small.returncode == 0]
        self.run, self.summary = self.disk / "run", Summary()

    def close(self) -> None:
        if "disk" in self.kinds:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)

    def start(self, kind: str) -> list[int]:
        victim, call = self.chance.randrange(self.world), self.chance.randrange(3, 40)
        call = max(3, call // 8) if kind == "sums" else call

        def armed(rank: int) -> None:
            if rank == victim and kind in ("step", "loader", "sums"):
                arm(kind, call)

        return fork_ranks(self.config, self.run, self.engine, self.world, self.log, armed)

    def moment(self, begun: int, while_writing: bool, alive: Callable[[], bool]) -> bool:
        """Wait for a random moment after the first step of this start; whether a checkpoint was being written."""
        patience, started = self.chance.uniform(0.2, 1.2), None
        while alive():
            if started is None and len(logged(self.run)) != begun:
                started = time.monotonic()
            writing = any((self.run / "checkpoints").glob(".*.partial"))
            late = started is not None and time.monotonic() - started > patience
            if (writing and while_writing and started is not None) or (late and not while_writing):
                return writing
            time.sleep(0.001)
        raise SystemExit(f"a rank ended by itself:\n{tail(self.log)}")

    def disturb(self, kind: str) -> None:
        """Start the run and let `kind` happen to it."""
        begun, said = len(logged(self.run)), self.log.stat().st_size if self.log.exists() else 0
        if kind == "launcher":
            timely = self.launch(begun)
        else:
            pids = self.start(kind)
            alive = lambda: os.waitpid(pids[-1], os.WNOHANG)[0] == 0
            timely = getattr(self, f"_{kind}", self._error)(pids, begun, alive)
        told = TOLD.get(kind, "") in self.log.read_text()[said:]
        self.summary.faults[kind] += 1
        self.summary.untold += not told
        self.summary.waits += not timely
        if not told or not timely:
            print(f"{kind}: {'in time' * timely}, {'told' * told}\n{self.log.read_text()[said:][-4000:]}", flush=True)

    def _kill(self, pids: list[int], begun: int, alive: Callable[[], bool]) -> bool:
        writing = self.moment(begun, self.summary.faults["kill"] % 3 == 0, alive)
        os.kill(self.chance.choice(pids), signal.SIGKILL)
        self.summary.while_writing += writing
        return wait(pids, TIMEOUT + 20, grace=5) is not None

    def _group(self, pids: list[int], begun: int, alive: Callable[[], bool]) -> bool:
        self.summary.while_writing += self.moment(begun, False, alive)
        os.killpg(pids[0], self.chance.choice(ENDS))
        return wait(pids, TIMEOUT, grace=TIMEOUT) is not None

    def _error(self, pids: list[int], begun: int, alive: Callable[[], bool]) -> bool:
        return wait(pids, 2 * TIMEOUT) is not None

    def _disk(self, pids: list[int], begun: int, alive: Callable[[], bool]) -> bool:
        self.summary.while_writing += self.moment(begun, False, alive)
        filler = self.disk / "filler"
        try:
            with filler.open("wb") as file:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
        except OSError:
            timely = wait(pids, TIMEOUT + 20, grace=5) is not None
        filler.unlink()
        return timely

    def _reader(self, pids: list[int], begun: int, alive: Callable[[], bool]) -> bool:
        reader = os.fork()
        if reader == 0:
            while True:
                for file in (self.run / "checkpoints").rglob("*"):
                    with suppress(OSError):  # a folder, or gone
                        file.read_bytes()
        try:
            return self._kill(pids, begun, alive)
        finally:
            os.kill(reader, signal.SIGKILL)
            os.waitpid(reader, 0)

    def launch(self, begun: int) -> bool:
        """The run under a real torchrun, which a signal then ends."""
        torchrun = [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={self.world}",
                    f"--master_port={free_port()}", str(ROOT / "mixar" / "train.py"), str(self.config)]  # fmt: skip
        with self.log.open("a") as log:
            process = subprocess.Popen([*torchrun, *overrides(self.run, self.engine)], stdout=log, stderr=log,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip
        self.moment(begun, False, lambda: process.poll() is None)
        process.send_signal(self.chance.choice(ENDS))
        try:
            process.wait(TIMEOUT)
            # of some signals torchrun dies at once, and its ranks end after it
            limit = time.monotonic() + TIMEOUT
            while subprocess.run(["pgrep", "-f", f"run_dir={self.run}"], stdout=subprocess.DEVNULL).returncode == 0:
                if time.monotonic() > limit:
                    raise subprocess.TimeoutExpired(torchrun, TIMEOUT)
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False
        return True

    def tell(self, faults: int) -> Summary:
        """The whole story; raises where a start fails that nobody disturbed."""
        whole, summary = self.disk / "whole", self.summary
        if wait(fork_ranks(self.config, whole, self.engine, self.world, self.log), 600) != [0] * self.world:
            raise SystemExit(f"the undisturbed run failed:\n{tail(self.log)}")
        for number in range(faults):
            done = max((record["step"] for record in logged(self.run)), default=0)
            if done > 0.6 * STEPS:  # room for more: the same run again, from its first checkpoints on
                shutil.rmtree(self.run)
            kind = self.kinds[number % len(self.kinds)]
            summary.resumes += bool(complete_checkpoints(self.run))
            self.disturb(kind)
            done = max((record["step"] for record in logged(self.run)), default=0)
            kept = complete_checkpoints(self.run)
            lost = done - (int(kept[-1].name) // 16 if kept else 0)
            summary.lost_steps, summary.most_lost = summary.lost_steps + lost, max(summary.most_lost, lost)
            summary.lost_by_signals += lost * (kind in ("group", "launcher"))
            print(f"{number + 1}: {kind}, at step {done}, {lost} lost", flush=True)
        summary.resumes += 1
        if wait(fork_ranks(self.config, self.run, self.engine, self.world, self.log), 600) != [0] * self.world:
            raise SystemExit(f"the run did not reach its end:\n{tail(self.log)}")
        expected, found = logged(whole), logged(self.run)
        summary.divergent_losses = sum(a != b for a, b in zip(expected, found)) + abs(len(expected) - len(found))
        return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="faults, of all kinds in turn")
    parser.add_argument("--engine", default="fsdp", help="ddp, fsdp, hsdp, zero1, zero2 or zero3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import mixar.train  # noqa: F401 - before the forks, so that a start takes no seconds

    torch.set_num_threads(1)  # a process that has started threads cannot be forked
    with tempfile.TemporaryDirectory() as folder:
        make_home(Path(folder))
        story = Story(Path(folder), args.engine, args.ranks, args.seed)
        try:
            summary = story.tell(args.kills)
        finally:
            story.close()
    print(json.dumps({"engine": args.engine, "ranks": args.ranks, **vars(summary)}))
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
