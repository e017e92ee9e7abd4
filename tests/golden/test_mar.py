"""MAR's backbone, losses, gradients, diffusion head and sampling loops against the public reference code."""

import math

import pytest
import torch
from fixtures import Fixture, assert_close, load

from mixar.config import ModelConfig, SampleConfig
from mixar.mixing import Masking
from mixar.model import Diffusion, MixAR, patchify, unpatchify
from mixar.model.attention import Wanted
from mixar.model.head import Head
from mixar.sampling.autoregressive import denoise, sample_steps
from mixar.weights import load_strict


def model_of(config: dict, state: dict) -> MixAR:
    """The `guidance: none` model that a fixture's configuration describes, holding its weights."""
    cfg = ModelConfig(
        guidance="none",
        grid=config["img_size"] // config["vae_stride"] // config["patch_size"],
        patch=config["patch_size"],
        latent_channels=config["vae_embed_dim"],
        code_bits=1,
        classes=config["class_num"],
        class_tokens=config["buffer_size"],
        encoder_width=config["encoder_embed_dim"],
        encoder_depth=config["encoder_depth"],
        encoder_heads=config["encoder_num_heads"],
        decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"],
        norm_eps=config.get("norm_eps", 1e-6),
        head_depth=config["diffloss_d"],
        head_width=config["diffloss_w"],
        diffusion_batch_mul=config["diffusion_batch_mul"],
    )
    model = MixAR(cfg)
    load_strict(model, state, "fixture")
    return model.eval()


def masking_of(mask: torch.Tensor) -> Masking:
    """The masking whose masked positions are the ones of `mask` [B, N]."""
    counts = mask.sum(-1).long().tolist()
    return Masking.from_order(mask.float().argsort(dim=-1, descending=True, stable=True), counts)


@pytest.fixture(scope="module")
def forward() -> Fixture:
    return load("mar_forward")


@pytest.fixture(scope="module")
def diffloss() -> Fixture:
    return load("diffloss")


def test_forward(forward: Fixture) -> None:
    model = model_of(forward.config, forward.under("sd."))
    given, expected = forward.under("in."), forward.under("out.")
    tokens = patchify(given["latents"], model.config.patch)
    assert torch.equal(tokens, expected["tokens"])
    assert torch.equal(unpatchify(tokens, model.config.patch), expected["unpatchify"])
    b, n = tokens.shape[:2]
    every = Wanted(torch.arange(b * n), (n,) * b)
    whole = masking_of(torch.ones(b, n))
    with torch.no_grad():
        for suffix, classes in (("", model.class_emb(given["labels"])), ("_uncond", model.fake_latent.expand(b, -1))):
            masking = masking_of(given["mask"])
            encoded = model.encode(tokens, classes, masking, None)
            assert_close(
                encoded.view_as(expected["encoder" + suffix]), expected["encoder" + suffix], 3e-6, "encoder" + suffix
            )
            z = model.condition(tokens, classes, masking, None, every).view(b, n, -1)
            assert_close(z, expected["z" + suffix], 3e-6, "z" + suffix)
        z = model.condition(tokens, model.class_emb(given["labels"]), whole, None, every).view(b, n, -1)
        assert_close(z, expected["z_all_masked"], 3e-6, "z_all_masked")


def test_training_loss_and_gradients(forward: Fixture) -> None:
    model = model_of(forward.config, forward.under("sd."))
    given, expected = forward.under("in."), forward.under("out.")
    tokens = patchify(given["latents"], model.config.patch)
    masking = masking_of(given["mask"])
    rows, mul = masking.masked_rows, model.config.diffusion_batch_mul
    t, noise = given["t"].view(mul, -1)[:, rows], given["noise"].view(mul, -1, tokens.shape[-1])[:, rows]
    losses = model(tokens, given["labels"], masking, None, t, noise)
    assert_close(losses.mse, expected["loss_mse"].view(mul, -1)[:, rows], 3e-6, "mse")
    for name, ours in (("loss_vb", losses.vb), ("loss_per_token", losses.mse + losses.vb)):
        torch.testing.assert_close(ours, expected[name].view(mul, -1)[:, rows], rtol=2e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(losses.loss.detach(), expected["loss"], rtol=2e-3, atol=0)
    losses.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = forward.under("out.grad.")
    assert gradients
    for name, gradient in gradients.items():
        assert parameters[name].grad is not None, name
        assert_close(parameters[name].grad, gradient, 1e-3, name)


def head_of(fixture: Fixture, prefix: str) -> Head:
    c = fixture.config
    head = Head(c["target_channels"], c["z_channels"], c["depth"], c["width"])
    load_strict(head, fixture.under(prefix + "net."), "fixture")
    return head.eval()


def test_head(diffloss: Fixture) -> None:
    head = head_of(diffloss, "sd.")
    given, expected = diffloss.under("in.net."), diffloss.tensors
    from mixar.ops import timestep_embed

    with torch.no_grad():
        assert_close(torch.cat(head(given["x"], given["t"], given["c"]), -1), expected["out.net"], 3e-6, "net")
        assert_close(head.time_embed(given["t"]), expected["out.time_embed"], 3e-6, "time_embed")
        # processors differ by a unit in the last place of the frequencies, which is 6e-5 of an angle at t = 999
        assert_close(timestep_embed(given["t"]), expected["out.time_sinusoid"], 6e-5, "sinusoid")
        # guided forward: the noisy tokens of the first half serve both halves, v stays unguided
        half = len(given["x"]) // 2
        both, v = head(given["x"][:half].repeat(2, 1), given["t"], given["c"])
        eps = both[half:] + given["cfg_scale"] * (both[:half] - both[half:])
        assert_close(torch.cat([eps.repeat(2, 1), v], -1), expected["out.net_cfg"], 3e-6, "net_cfg")


def test_diffusion_training(diffloss: Fixture) -> None:
    head = head_of(diffloss, "sd.")
    given, expected = diffloss.under("in.train."), diffloss.under("out.train.")
    diffusion = Diffusion()
    with torch.no_grad():
        mse, vb = diffusion.losses(lambda x, t: head(x, t, given["c"]), given["target"], given["t"], given["noise"])
    c = diffusion.coefficients(given["t"])
    x_t = c["sqrt_alphas_cumprod"] * given["target"] + c["sqrt_one_minus_alphas_cumprod"] * given["noise"]
    assert_close(x_t, expected["x_t"], 1e-6, "x_t")
    assert_close(mse, expected["mse"], 3e-6, "mse")
    torch.testing.assert_close(vb, expected["vb"], rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(mse + vb, expected["loss"], rtol=5e-3, atol=1e-5)
    masked = ((mse + vb) * given["mask"]).sum() / given["mask"].sum()
    torch.testing.assert_close(masked, expected["loss_masked"], rtol=5e-3, atol=0)
    torch.testing.assert_close((mse + vb).mean(), expected["loss_mean"], rtol=5e-3, atol=0)


def test_ancestral_step(diffloss: Fixture) -> None:
    head = head_of(diffloss, "sd_loop.")
    given, expected = diffloss.under("in.p."), diffloss.under("out.p.")
    diffusion = Diffusion(diffloss.config["num_sampling_steps"])
    with torch.no_grad():
        eps, v = head(given["x"], diffusion.timesteps[given["t"]], given["c"])
        sample, parts = diffusion.ancestral_step(
            given["t"], given["x"], eps, v, given["noise"], given["temperature"].item()
        )
    assert_close(parts["log_variance"], expected["log_variance"], 1e-5, "log_variance")
    for name in ("mean", "pred_xstart"):
        assert_close(parts[name], expected[name], 5e-4, name)
    assert_close(sample, expected["sample"], 5e-4, "sample")


@pytest.mark.parametrize("run", ["loop_cfg", "loop_nocfg"])
def test_ancestral_loop(diffloss: Fixture, run: str) -> None:
    head = head_of(diffloss, "sd_loop.")
    given, expected = diffloss.under(f"in.{run}."), diffloss.under(f"out.{run}.")
    rows = len(given["noise_init"])
    guided = "cfg" in given
    with torch.no_grad():
        steps = denoise(
            head,
            Diffusion(diffloss.config["num_sampling_steps"]),
            given["z"],
            given["cfg"].item() if guided else 1.0,
            given["noise_init"],
            lambda done: given["noise_steps"][done][:rows],
            SampleConfig(temperature=given["temperature"].item()),
        )
        trajectory = torch.stack(list(steps))
    assert_close(trajectory, expected["trajectory"][:, :rows], 5e-4, "trajectory")
    assert_close(trajectory[-1], expected["samples"][:rows], 5e-4, "samples")


def test_diffusion_tables_of_the_head(diffloss: Fixture) -> None:
    for kind, spec in (("train", None), ("gen", diffloss.config["num_sampling_steps"])):
        check_tables(Diffusion(spec), diffloss.under(f"out.table.{kind}."), 1e-12)


def check_tables(diffusion: Diffusion, expected: dict, tolerance: float) -> None:
    assert torch.equal(diffusion.timesteps, expected.pop("timestep_map"))
    assert expected
    for name, table in expected.items():
        ours = torch.tensor(diffusion.tables[name])
        torch.testing.assert_close(
            ours, table, rtol=tolerance, atol=1e-300 if table.abs().min() > 0 else 1e-15, msg=name
        )


class RecordedNoise:
    """The reference's own draws, in its order: conditional rows first."""

    def __init__(self, given: dict) -> None:
        self.given = given

    def initial(self, step: int, rows: torch.Tensor) -> torch.Tensor:
        return self.given[f"step{step:02d}.noise_init"]

    def during(self, step: int, diffusion_step: int, rows: torch.Tensor) -> torch.Tensor:
        return self.given[f"step{step:02d}.noise_steps"][diffusion_step][: len(rows)]


def test_sampling_loops() -> None:
    fixture = load("mar_sample")
    model = model_of(fixture.config["model"], fixture.under("sd."))
    assert fixture.config["runs"]
    for run, settings in fixture.config["runs"].items():
        given, expected = fixture.under(f"{run}.in."), fixture.under(f"{run}.out.")
        order = given["orders"]
        b, n = order.shape
        sampling = SampleConfig(
            steps=settings["num_iter"], diffusion_steps=fixture.config["model"]["num_sampling_steps"],
            cfg_scale=settings["cfg"], cfg_schedule=settings["cfg_schedule"], temperature=settings["temperature"],
        )  # fmt: skip
        labels = given["labels"] if settings["labels"] else None
        steps = sample_steps(model, labels, None, order, RecordedNoise(given), sampling)
        before = torch.zeros(b, n, model.config.token_dim)
        revealing = [i for i in range(settings["num_iter"]) if expected["mask_to_pred"][i].any()]
        for i, step in zip(revealing, steps, strict=True):
            name = f"{run} step {i}"
            mask = torch.zeros(b, n).scatter(1, order[:, : step.plan.before], 1.0)
            assert torch.equal(mask, expected["mask_before"][i].float()), name
            predicted = torch.zeros(b * n, dtype=torch.bool)
            predicted[step.rows] = True
            assert torch.equal(predicted.view(b, n), expected["mask_to_pred"][i]), name
            assert math.isclose(step.plan.cfg_scale, expected["cfg_iter"][i].item(), rel_tol=1e-6), name
            assert_close(before, expected["tokens_before"][i], 3e-3, f"{name} tokens_before")
            assert_close(step.z, expected[f"step{i:02d}.z"], 3e-3, f"{name} z")
            before = step.tokens
        assert_close(unpatchify(before, model.config.patch), expected["latents"], 3e-3, f"{run} latents")
