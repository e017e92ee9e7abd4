"""The perceptual and the adversarial loss: their values and gradients against plain forms, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixar.codecs.discriminator import Discriminator
from mixar.config import Config, check_inputs, load_config
from mixar.data.batch import Batch
from mixar.dist import Place
from mixar.errors import UserError
from mixar.evaluation.classifier import Classifier, ClassifierConfig
from mixar.objectives import TokenizerObjective, VAEObjective
from mixar.objectives.codecs import CodecObjective, hinge_loss, perceptual_loss
from mixar.train import train
from tests.home import make_sources, save_features

OBJECTIVES = {"vae": VAEObjective, "tokenizer": TokenizerObjective}
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The sources of a run, and the export of a classifier of its images."""
    make_sources(tmp_path)
    save_features(tmp_path / "features", 32)
    return tmp_path


def config(root: Path, kind: str, *overrides: str) -> Config:
    """Images of 32 pixels, with both losses."""
    return load_config(root / "config.yaml", [
        f"task={kind}", "data.image_size=32", f"{kind}.perceptual_weight=0.5", f"{kind}.discriminator_weight=0.3",
        f"{kind}.perceptual_features={root}/features", f"{kind}.discriminator_width=8", *overrides,
    ])  # fmt: skip


def begun(cfg: Config) -> tuple[CodecObjective, nn.Module]:
    objective = OBJECTIVES[cfg.task](cfg, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), CPU)
    objective.load_frozen()
    model = objective.build()
    model.load_state_dict({name: objective.initial(name, value) for name, value in model.state_dict().items()})
    return objective, model.train()


def batch(seed: int = 0) -> Batch:
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Batch(torch.arange(4), [0, 1, 2, 3], list("abcd"), torch.zeros(4, dtype=torch.long), images=images)


def gradients(loss: Tensor, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the codec and those of the discriminator; None as zeros."""
    model.zero_grad(set_to_none=False)
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    judge = {name: value for name, value in found.items() if name.startswith("discriminator.")}
    return {name: value for name, value in found.items() if name not in judge}, judge


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], to: float = 1e-5) -> None:
    size = sum(value.square().sum() for value in expected.values()).sqrt()
    distance = sum((found[name] - value).square().sum() for name, value in expected.items()).sqrt()
    assert found.keys() == expected.keys() and size > 0 and distance <= to * size


def test_the_perceptual_loss_is_its_plain_form_in_float64() -> None:
    torch.manual_seed(0)
    network = Classifier(ClassifierConfig(3, 16, widths=[5, 6, 7])).eval().requires_grad_(False)
    output, target = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    output.requires_grad_()
    loss = perceptual_loss(network.maps, output, target)
    (gradient,) = torch.autograd.grad(loss, output)

    def unit(x: Tensor) -> Tensor:
        return x / x.norm() if x.any() else x  # behind a ReLU all channels may be zero

    def plain(x: Tensor) -> Tensor:
        each = []
        for a, b in zip(network.maps(x), network.maps(target.double())):
            at = [
                (a[i, :, r, c], b[i, :, r, c]) for i in range(2) for r in range(a.shape[2]) for c in range(a.shape[3])
            ]
            each.append(sum((unit(u) - unit(v)).square().sum() for u, v in at) / len(at))
        assert len(each) == 3
        return sum(each) / 3

    network.double()
    x = output.detach().double().requires_grad_()
    expected = plain(x)
    (exact,) = torch.autograd.grad(expected, x)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - exact).norm() < 1e-4 * exact.norm()
    step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    difference = (plain(x.detach() + step) - plain(x.detach() - step)).item() / 2
    assert difference == pytest.approx((exact * step).sum().item(), rel=1e-4)
    assert perceptual_loss(network.float().maps, target, target).item() == 0


@pytest.mark.parametrize(("kind", "precision"), [("vae", "fp32"), ("tokenizer", "fp32"), ("vae", "bf16")])
def test_each_network_gets_the_gradient_of_its_own_loss(root: Path, kind: str, precision: str) -> None:
    to = 1e-5 if precision == "fp32" else 1e-2
    with Place(0, 1, CPU).autocast(precision):
        check_gradients(*begun(config(root, kind)), to)


def check_gradients(objective: CodecObjective, model: nn.Module, to: float) -> None:
    total, scalars = objective.loss(model, batch(), epoch=0.0)
    codec, judge = gradients(total, model)

    # the codec's loss, with a discriminator that is frozen
    images = batch().images.float() / 255
    model.discriminator.requires_grad_(False)
    output, found, _ = model(images, objective.inputs(batch()))
    alone = (output - images).abs().mean() + (output - images).square().mean() + objective.own_loss(found)[0]
    alone = alone + 0.5 * perceptual_loss(objective.maps, output, images) - 0.3 * model.discriminator(output).mean()
    assert_same(codec, gradients(alone, model)[0], to)
    assert scalars["loss"][0].item() == pytest.approx(alone.item(), rel=to)

    # the discriminator's, with images that are fixed
    model.discriminator.requires_grad_(True)
    real, fake = model.discriminator(images), model.discriminator(output.detach())
    own = ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()) / 2
    assert_same(judge, gradients(own, model)[1], to)
    assert scalars["loss/discriminator"][0].item() == pytest.approx(own.item(), rel=to)
    assert scalars["loss/adversarial"][0].item() == pytest.approx(-fake.mean().item(), rel=10 * to)


def test_before_its_start_only_the_discriminator_learns(root: Path) -> None:
    cfg = config(root, "vae", "vae.discriminator_start=1")
    objective, model = begun(cfg)
    before, after = (gradients(objective.loss(model, batch(), epoch)[0], model) for epoch in (0.9, 1.0))
    plain, alone = begun(config(root, "vae", "vae.discriminator_weight=0"))
    assert_same(before[0], gradients(plain.loss(alone, batch(), 0.9)[0], alone)[0])
    assert_same(before[1], after[1])
    with pytest.raises(AssertionError):
        assert_same(before[0], after[0], to=1e-3)


def test_the_hinge_ends_at_a_distance_of_one() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0], requires_grad=True), torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    loss = hinge_loss(real, fake)
    assert loss.item() == pytest.approx((0.5 + 2 + 1 + 2) / 6)
    loss.backward()
    assert real.grad.tolist() == pytest.approx([0, -1 / 6, -1 / 6])
    assert fake.grad.tolist() == pytest.approx([0, 1 / 6, 1 / 6])


def test_an_image_is_judged_by_itself() -> None:
    judge, images = Discriminator(8), torch.rand(3, 3, 40, 40)
    together = judge(images)
    assert together.shape == (3, 1, 3, 3)
    torch.testing.assert_close(together[1:2], judge(images[1:2]))


def test_a_codec_keeps_its_values_and_names_beside_a_discriminator(root: Path) -> None:
    _, judged = begun(config(root, "vae"))
    _, plain = begun(config(root, "vae", "vae.discriminator_weight=0"))
    state = judged.state_dict()
    assert all(torch.equal(state.pop(name), value) for name, value in plain.state_dict().items())
    assert state and all(name.startswith("discriminator.") for name in state)


def test_other_features_do_not_resume_a_run(root: Path) -> None:
    train(config(root, "vae", "train.epochs=0.25"))
    (root / "features").rename(root / "moved")  # the same classifier from elsewhere
    train(config(root, "vae", "train.epochs=0.5", f"vae.perceptual_features={root}/moved"))
    save_features(root / "features", 32, seed=1)
    with pytest.raises(UserError, match="they differ in features"):
        train(config(root, "vae", "train.epochs=0.75"))


def test_features_that_are_missing_or_do_not_fit_are_refused(root: Path) -> None:
    key = "tokenizer.perceptual_features"
    absent = config(root, "tokenizer", f"{key}={root}/absent")
    with pytest.raises(UserError, match=rf"^{key}=\S+ is not there: write {key}=<its path>$"):
        train(absent)
    check_inputs(
        load_config(None, ["task=tokenizer", f"{key}={root}/absent"]), resumes=False
    )  # without a weight: unused
    save_features(root / "small", 16)
    torch.save({"weight": torch.zeros(1)}, root / "other.pth")
    others = {"small": "16x16 images, but data.image_size=32", "other.pth": "is not torch-fidelity's InceptionV3",
              "vae": "expected 'classifier'"}  # fmt: skip
    for name, told in others.items():
        with pytest.raises(UserError, match=rf"^{key}=\S+{name}: .*{told}"):
            train(config(root, "tokenizer", f"{key}={root}/{name}", f"run_dir={root}/{name}-run"))
