"""What a user sees of a run while it runs: TensorBoard, traces of steps, jumps of the loss."""

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mixar.cards import CARDS, find_card
from mixar.config import load_config, to_yaml
from mixar.data.image_set import ImageSet
from mixar.data.images import ImageSource
from mixar.demo.compare import median_step
from mixar.engine import StepInfo
from mixar.errors import UserError
from mixar.metrics import CHARTS, Metrics, read_metrics
from mixar.plan import make_plan, step_flops
from mixar.plan.work import prior_flops
from mixar.prior import Prior
from mixar.tasks import build_objective
from mixar.train import train
from mixar.trainer import _Recent
from tests.home import end, fork_ranks, records, train_arguments

OLD = Path(__file__).parents[1] / "old" / "run"


def config(home: Path, run: Path, *overrides: str):
    return load_config(home / "config.yaml", [f"run_dir={run}", *overrides])


def board_of(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    return board


@pytest.fixture(scope="module")
def traced(home, tmp_path_factory) -> Path:
    """A run of 10 steps, of which steps 3 and 4 are traced."""
    run = tmp_path_factory.mktemp("traced") / "run"
    train(config(home, run, "train.profile=3:2"))
    return run


def test_both_reports_have_the_same_names_in_few_groups(traced) -> None:
    named = {name for record in records(traced) for name in record} - {"step", "images", "time"}
    assert named == set(board_of(traced).Tags()["scalars"])
    assert {name.split("/")[0] for name in named} == {"loss", "optim", "speed", "ti_mix"}
    assert not any("mfu" in name for name in named), "a CPU has no peak to compare with"


def test_a_line_tells_the_time_of_steps_and_of_checkpoints(traced) -> None:
    by_step = {record["step"]: record for record in records(traced)}
    for record in by_step.values():
        seconds = 16 / record["speed/images_per_second"]
        assert record["speed/seconds_per_step"] == pytest.approx(seconds) and 0 <= record["speed/data_wait"] <= 1
    assert "speed/checkpoint_seconds" not in by_step[5], "the checkpoint after step 5 is in the next line"
    assert by_step[6]["speed/checkpoint_seconds"] > 0
    (line,) = [line for line in (traced / "log.txt").read_text().splitlines() if " step 6 " in line]
    assert " s/step  wait " in line and "  checkpoint " in line and "MFU" not in line and "memory" not in line


def test_tensorboard_has_charts_config_and_hyperparameters_in_one_run(traced) -> None:
    assert len(list(traced.rglob("events.out.*"))) == 1, "another file or folder would be another run"
    board = board_of(traced)
    (layout,) = board.Tensors("custom_scalars__config__")
    charts = Layout.FromString(layout.tensor_proto.string_val[0]).category[0].chart
    assert [chart.title for chart in charts] == [*CHARTS]
    (text,) = board.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    own = to_yaml(load_config(traced / "config.yaml"))
    assert shown == "".join(f"    {line}\n" for line in own.splitlines())
    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["optim.lr"].number_value == 0.02 and values["model.guidance"].string_value == "dc_mix"
    content = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    finals = [metric.name.tag for metric in HParamsPluginData.FromString(content).experiment.metric_infos]
    assert "loss" in finals and set(finals) <= set(board.Tags()["scalars"])
    assert "_hparams_/session_end_info" in board.summary_metadata


def test_traced_steps_are_json_with_their_events(traced) -> None:
    (file,) = (traced / "tb").glob("*.pt.trace.json.gz")
    assert file.name == "steps-3-4.pt.trace.json.gz"
    with gzip.open(file, "rt") as text:
        events = json.load(text)["traceEvents"]
    steps = {event["name"]: event for event in events if event["name"].startswith("ProfilerStep#")}
    assert {"ProfilerStep#3", "ProfilerStep#4"} == set(steps)
    begun, seconds = steps["ProfilerStep#3"]["ts"], steps["ProfilerStep#3"]["dur"]
    inside = {event["name"] for event in events if "dur" in event and begun <= event["ts"] <= begun + seconds}
    assert "aten::linear" in inside and any("Backward" in name for name in inside)


def test_a_resumed_run_traces_only_what_is_ahead(home, traced, tmp_path) -> None:
    run = Path(shutil.copytree(traced, tmp_path / "run"))
    train(config(home, run, "train.epochs=3", "train.profile=9:3"))  # it resumes at step 10
    assert [file.name for file in (run / "tb").glob("*.json.gz")] == ["steps-3-4.pt.trace.json.gz"]
    train(config(home, run, "train.epochs=3.5", "train.profile=13:50"))  # and ends at step 14
    assert (run / "tb" / "steps-13-62.pt.trace.json.gz").is_file()


@pytest.mark.parametrize("given", ["3", "a:1", "3:0", "-1:3", "3:101", "1:2:3", "3:"])
def test_steps_to_trace_that_are_none_are_refused(home, tmp_path, given) -> None:
    with pytest.raises(UserError, match=rf"train\.profile={given} is not FIRST:COUNT.*write train\.profile=100:3"):
        config(home, tmp_path, f"train.profile={given}")


def test_steps_to_trace_are_no_number_of_base_60(home, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("train: {profile: 10:30}\n")
    cfg = load_config(tmp_path / "run.yaml")
    (tmp_path / "again.yaml").write_text(to_yaml(cfg))
    assert cfg.train.profile == "10:30" and load_config(tmp_path / "again.yaml") == cfg


def test_metrics_of_an_earlier_version_are_read_by_their_present_names(home, tmp_path) -> None:
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    assert median_step(run, 16) == pytest.approx(16 / records(run)[0]["images_per_second"])
    train(config(home, run, "task=vae", "vae.width=4", "vae.attention_levels=[-1]", "train.epochs=1.25"))
    found = read_metrics(run)
    assert len(found) == 3
    assert found[0].keys() == found[-1].keys() - {"speed/seconds_per_step", "speed/checkpoint_seconds"}


def test_mfu_is_the_flop_over_the_peak_of_the_interval(home, tmp_path) -> None:
    metrics = Metrics(tmp_path, config(home, tmp_path), torch.device("cpu"), 0, 0, 100)
    metrics.write(2, 32, {"loss": 1.0}, {"data": 0.0, "peak": 1e9})
    metrics.close()
    (record,) = records(tmp_path)
    assert record["speed/mfu"] == pytest.approx(1e9 / (2 * record["speed/seconds_per_step"]))


def test_the_flop_of_a_step_are_the_plan_s(home) -> None:
    cfg = config(home, Path("run"), "ti_mix.schedule=constant")
    with torch.device("meta"):
        prior = Prior(cfg.prior)
    flops, plan = step_flops(cfg, 8, prior), make_plan(cfg)["flops"]
    assert flops(0.0) == pytest.approx(plan["backbone"] + plan["head"])
    assert flops(1.0) == pytest.approx(plan["backbone"] + plan["head"] + prior_flops(prior))


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA B200", "b200"), ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None), ("Tesla V100", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)  # fmt: skip
def test_cards_go_by_the_driver_s_name(device, card) -> None:
    assert find_card(device) == (CARDS[card] if card else None)


@pytest.mark.parametrize(("classes", "count"), [(3, 90), (40, 400), (1, 5)])
def test_a_codec_s_preview_shows_all_classes(home, classes, count) -> None:
    labels = sorted(i % classes for i in range(count))  # class by class, as a folder is read
    pixels = [torch.full((16, 16), label, dtype=torch.uint8).numpy() for label in labels]
    images = ImageSet([str(i) for i in range(classes)], labels, [str(i) for i in range(count)], pixels)
    objective = build_objective(config(home, Path("run"), "task=vae"), {}, torch.device("cpu"), ImageSource(images, 16))
    shown = objective.shown[:, 0, 0, 0].tolist()  # type: ignore[attr-defined]
    assert len(shown) == min(32, count) and len(set(shown)) == min(32, classes)
    assert max(map(shown.count, shown)) - min(map(shown.count, shown)) <= 1


def step_of(loss: float, norm: float) -> StepInfo:
    finite = torch.tensor(float(math.isfinite(loss) and math.isfinite(norm)))
    return StepInfo(torch.tensor(loss), torch.tensor(norm), finite, {})


def odd_steps(losses: list[float], norms: list[float], every: int = 7) -> list[int]:
    """The steps that are reported, read at intervals of `every` steps."""
    recent, found = _Recent(), []
    for step, (loss, norm) in enumerate(zip(losses, norms)):
        recent.add(step, [], step_of(loss, norm))
        if step % every == every - 1 or step == len(losses) - 1:
            found += [record["step"] for record in recent.drain()]
    return found


def training(steps: int = 400) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of an ordinary training: they fall, and the norms have a heavy tail."""
    noise = torch.randn(2, steps, generator=torch.Generator().manual_seed(0))
    fall = torch.exp(-torch.arange(steps) / 40)
    return (0.4 + fall + 0.05 * noise[0]).tolist(), ((0.5 + 3 * fall) * torch.exp(0.3 * noise[1])).tolist()


def test_an_ordinary_training_jumps_nowhere() -> None:
    assert odd_steps(*training()) == []
    rising = [step / 400 for step in range(400)]  # as during a warm-up
    assert odd_steps(training()[0], rising) == []


def test_a_jump_is_reported_once_and_does_not_hide_the_next() -> None:
    losses, norms = training()
    for step in (200, 201, 202, 320):
        losses[step] = 9.0
    norms[250] = 60.0
    losses[260] = math.nan
    assert odd_steps(losses, norms) == odd_steps(losses, norms, every=400) == [200, 250, 260, 320]


@pytest.mark.slow
def test_a_planted_jump_is_in_the_log_and_in_replay(home, tmp_path) -> None:
    fault = (  # the loss of step 40 is a thousand times as large on both ranks
        "from mixar.objectives import MixARObjective as faulty\nloss, count = faulty.loss, [0]\n"
        "def jumps(*args):\n    count[0] += 1\n    value, parts = loss(*args)\n"
        "    return value * (1000 if count[0] == 41 else 1), parts\n"
        "faulty.loss = jumps\nfrom mixar.train import main\nmain()\n"
    )
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ["-c", fault, *train_arguments(home, run, "train.epochs=12", "train.log_every=10")[1:]]
    assert end(fork_ranks(arguments, 2, None, log)) == [0, 0], log.read_text()[-3000:]
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "jumped" in line]
    assert "step 40 jumped (loss " in line and line.endswith("replay/step-40.json")
    (file,) = (run / "replay").iterdir()
    replay = json.loads(file.read_text())
    assert replay["finite"] and len(set(replay["keys"])) == 16, "the images of both ranks"
    assert float(replay["loss"]) > 100 * replay["median_loss"]
