"""From labels and seeds to images, with whole models of random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mixar
from mixar.codecs import VAE
from mixar.errors import UserError
from mixar.sampling import MixARPipeline, find_export
from mixar.weights import describe_export, fingerprint

LABELS, SEEDS = [0, 1, 2, 0, 1], [11, 12, 13, 14, 15]


def difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.int() - b.int()).abs().max().item()


@pytest.mark.parametrize("guidance", ["none", "dc_mix", "dc_sa", "dc_ca"])
def test_image_depends_on_its_seed_alone(make_pipeline, guidance):
    pipeline = make_pipeline(guidance)
    together = pipeline(LABELS, SEEDS)  # in batches of 4 and 1
    assert together.shape == (5, 3, 16, 16)
    # matrix products of other sizes add up in another order, which may carry a pixel over the edge of its level
    for i in range(5):
        assert difference(pipeline(LABELS[i : i + 1], SEEDS[i : i + 1]), together[i : i + 1]) <= 1
    assert difference(pipeline.with_settings(batch=2)(LABELS, SEEDS), together) <= 1
    assert difference(pipeline(LABELS[::-1], SEEDS[::-1]).flip(0), together) <= 1
    assert difference(pipeline(LABELS, [seed + 5 for seed in SEEDS]), together) > 50
    assert difference(pipeline([2, 2, 0, 1, 0], SEEDS), together) > 1


@pytest.mark.parametrize(("guidance", "process"), [("none", "ddpm"), ("dc_sa", "flow")])
def test_round_trip(make_pipeline, tmp_path, guidance, process):
    pipeline = make_pipeline(guidance, process)
    folder = pipeline.save_pretrained(tmp_path / "run" / "exports" / "9-ema", images=9)
    again = mixar.MixARPipeline.from_pretrained(tmp_path / "run", "cpu", "fp32")
    for name, network in again.networks.items():
        torch.testing.assert_close(network.state_dict(), pipeline.networks[name].state_dict(), rtol=0, atol=0)
    assert difference(again(LABELS, SEEDS), pipeline(LABELS, SEEDS)) <= 1  # packed weights round differently
    assert again.settings == pipeline.settings and again.networks.keys() == pipeline.networks.keys()
    assert json.loads((folder / "config.json").read_text())["images"] == 9
    with pytest.raises(UserError, match="exists"):
        pipeline.save_pretrained(folder)


def test_an_export_does_not_ask_for_the_attention_it_was_trained_with(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.model.config.attention = "fa2"
    folder = pipeline.save_pretrained(tmp_path / "export")
    assert MixARPipeline.from_pretrained(folder).model.config.attention == "auto"


def test_stream_gives_what_a_call_gives(make_pipeline):
    pipeline = make_pipeline()
    batches = list(pipeline.stream(LABELS, SEEDS))
    assert [len(images) for images in batches] == [4, 1]
    assert torch.equal(torch.cat(batches), pipeline(LABELS, SEEDS))


def test_discrete_tokens_steer(make_pipeline):
    pipeline = make_pipeline()
    codes = pipeline.sample_codes(LABELS, SEEDS)
    assert codes.shape == (5, 64) and codes.min() >= 0 and codes.max() < 16 and len(codes.unique()) > 4
    assert torch.equal(pipeline(LABELS, SEEDS, codes), pipeline(LABELS, SEEDS))
    assert difference(pipeline(LABELS, SEEDS, 15 - codes), pipeline(LABELS, SEEDS)) > 1
    decoded = pipeline.decode_codes(codes)
    assert decoded.shape == (5, 3, 16, 16) and decoded.dtype == torch.uint8


def test_more_steps_than_positions(make_pipeline):
    images = make_pipeline().with_settings(steps=70, prior_steps=128)(LABELS, SEEDS)
    assert images.shape == (5, 3, 16, 16) and len(images.unique()) > 8


@pytest.mark.parametrize(
    "change", [{"cfg_scale": 4.0}, {"temperature": 0.5}, {"diffusion_steps": "7"}, {"prior_cfg_scale": 0.0}]
)
def test_settings_matter(make_pipeline, change):
    pipeline = make_pipeline()
    before = pipeline(LABELS, SEEDS)
    assert difference(pipeline.with_settings(**change)(LABELS, SEEDS), before) > 1
    assert torch.equal(pipeline(LABELS, SEEDS), before)  # the original keeps its own


def test_bf16_stays_near(make_pipeline):
    pipeline = make_pipeline("none")
    single = pipeline(LABELS, SEEDS)
    pipeline.precision = "bf16"
    assert 0 < (pipeline(LABELS, SEEDS).float() - single.float()).abs().mean() < 5


@pytest.mark.parametrize(
    ("labels", "seeds", "settings", "says"),
    [
        ([3], [0], {}, r"0\.\.2, given: \[3\]"),
        ([-1], [0], {}, r"0\.\.2"),
        ([], [], {}, r"0\.\.2"),
        ([1, 2], [0], {}, "one seed per label"),
        ([1], [0], {"prior_steps": 129}, "128 or fewer"),
    ],
)
def test_impossible_requests(make_pipeline, labels, seeds, settings, says):
    with pytest.raises(UserError, match=says):
        make_pipeline().with_settings(**settings)(labels, seeds)


def test_no_discrete_side(make_pipeline):
    with pytest.raises(UserError, match="guidance none"):
        make_pipeline("none").sample_codes(LABELS, SEEDS)


def test_newest_export_of_a_run(tmp_path, release):
    for name in ("9-ema", "80-ema", "100-ema-samples", "notes"):
        (tmp_path / "exports" / name).mkdir(parents=True)
        (tmp_path / "exports" / name / "config.json").touch()
    assert find_export(tmp_path).name == "80-ema"
    assert find_export(release) == release
    with pytest.raises(UserError, match="mixar export"):
        find_export(tmp_path / "exports")


def test_export_without_its_codecs(make_pipeline, tmp_path):
    folder = make_pipeline().save_pretrained(tmp_path / "half")
    (folder / "prior" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"without prior.* prior\.weights=PATH"):
        MixARPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model", "vae", "tokenizer", "prior"])
def test_weights_that_are_not_finite_are_named(make_pipeline, tmp_path, name):
    pipeline = make_pipeline()
    folder = pipeline.save_pretrained(tmp_path / "export")
    next(pipeline.networks[name].parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=f"the {'mixar' if name == 'model' else name} has weights that are not finite"):
        pipeline.save_pretrained(tmp_path / "other")
    file = (folder if name == "model" else folder / name) / "model.safetensors"
    state, known = pipeline.networks[name].state_dict(), describe_export(file.parent)["fingerprint"]
    save_file(state, file)  # as of a version that wrote them
    for config in {folder / "config.json", file.with_name("config.json")}:
        config.write_text(config.read_text().replace(known, fingerprint(state)))
    with pytest.raises(UserError, match=f"weights of the {name} in .* are not finite"):
        MixARPipeline.from_pretrained(folder)


def test_too_many_images_for_the_gpu_are_told_with_how_many_to_take(make_pipeline, monkeypatch):
    pipeline, decode = make_pipeline(), VAE.decode

    def of_a_small_card(vae, latents):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return decode(vae, latents)

    monkeypatch.setattr(VAE, "decode", of_a_small_card)
    for batch, fix in ((4, 2), (2, 1)):
        with pytest.raises(UserError, match=f"memory for {batch} images at once: write sample.batch={fix}"):
            pipeline.with_settings(batch=batch)(LABELS, SEEDS)
    assert len(pipeline.with_settings(batch=1)(LABELS, SEEDS)) == 5


def test_black_images_of_nothing_finite_are_refused(make_pipeline):
    pipeline = make_pipeline()
    pipeline.vae.decoder.conv_out.bias.data[1] = float("nan")
    with pytest.raises(UserError, match="the vae gave values that are not finite"):
        pipeline(LABELS, SEEDS)
    pipeline.tokenizer.decoder.conv_out.bias.data[1] = float("inf")
    with pytest.raises(UserError, match="the tokenizer gave values that are not finite"):
        pipeline.decode_codes(torch.zeros(1, 64, dtype=torch.long))
    pipeline.prior.prediction_layer.bias.data[3] = float("nan")
    for draw in (pipeline, pipeline.sample_codes):
        with pytest.raises(UserError, match="the prior gave values that are not finite"):
            draw(LABELS, SEEDS)
    with pytest.raises(UserError, match="the model gave values that are not finite"):
        pipeline = make_pipeline()
        pipeline.model.z_proj.bias.data[1] = float("nan")
        pipeline(LABELS, SEEDS)
