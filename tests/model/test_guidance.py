"""The four ways in which discrete tokens enter, and the packing of images that show different amounts."""

import pytest
import torch

from mixar import rng
from mixar.config import GUIDANCES, ModelConfig
from mixar.mixing import Masking, Mixture, ti_mix
from mixar.model import MixAR, init_weights
from mixar.model.attention import Wanted
from mixar.model.guidance import CLASSES
from mixar.model.init import RULES
from mixar.ops import code_bits
from mixar.rng import Stream

N, C = 16, 6


def build(guidance: str, **changes) -> MixAR:
    cfg = {
        "guidance": guidance, "grid": 4, "latent_channels": C, "code_bits": 5, "code_dim": None, "classes": 4,
        "class_tokens": 3, "encoder_width": 32, "encoder_depth": 2, "encoder_heads": 4, "decoder_width": 48,
        "decoder_depth": 1, "decoder_heads": 3, "head_depth": 1, "head_width": 24,
    }  # fmt: skip
    model = MixAR(ModelConfig(**(cfg | changes)))
    init_weights(model, 0)
    return model.eval()


def inputs(b: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(b, N, C, generator=generator)
    codes = torch.randint(0, 32, (b, N), generator=generator)
    order = rng.permutation(seed, Stream.MASK_ORDER, torch.arange(b), N)
    return tokens, torch.arange(b) % 4, codes, order


def z_of(model: MixAR, tokens, labels, codes, masking) -> torch.Tensor:
    given = None if model.config.guidance == "none" else codes
    with torch.no_grad():
        every = Wanted(torch.arange(len(tokens) * N), (N,) * len(tokens))
        return model.condition(tokens, model.class_embedding(labels), masking, given, every).view(len(tokens), N, -1)


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_packed_images_do_not_mix(guidance: str) -> None:
    model = build(guidance)
    tokens, labels, codes, order = inputs(4)
    counts = [12, 14, 14, 16]
    together = z_of(model, tokens, labels, codes, Masking.from_order(order, counts))
    for b, count in enumerate(counts):
        one = slice(b, b + 1)
        alone = z_of(model, tokens[one], labels[one], codes[one], Masking.from_order(order[one], [count]))
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_masked_tokens_are_never_seen(guidance: str) -> None:
    model = build(guidance)
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12] * 3)
    hidden = tokens.masked_fill(masking.masked[..., None], 1e4)
    assert torch.equal(z_of(model, tokens, labels, codes, masking), z_of(model, hidden, labels, codes, masking))


def test_dc_mix_takes_codes_at_masked_positions_only() -> None:
    model = build("dc_mix")
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12] * 3)
    base = z_of(model, tokens, labels, codes, masking)
    assert torch.equal(base, z_of(model, tokens, labels, torch.where(masking.masked, codes, codes ^ 31), masking))
    assert not torch.allclose(base, z_of(model, tokens, labels, codes ^ 31, masking), atol=1e-4)


def test_dc_mix_maps_learned_codes_as_it_maps_bits() -> None:
    """With MaskBit's corners for a codebook, and the same map, nothing changes: seen, dropped and mixed tokens."""
    bits, learned = build("dc_mix"), build("dc_mix", code_dim=5)
    bits.code_proj.bias.data.normal_(0, 0.1)  # it starts at zero
    learned.load_state_dict(bits.state_dict() | {"code_proj.codebook": code_bits(torch.arange(32), 5)})
    tokens, labels, codes, order = inputs()
    codes[1] = -1
    masking = Masking.from_order(order, [12] * 3)
    mixture = Mixture((codes ^ 31).masked_fill(codes < 0, -1), rng.uniform(0, Stream.RHO, torch.arange(3), N),
                      torch.tensor([0.4]))  # fmt: skip
    classes, every = bits.class_embedding(labels), Wanted(torch.arange(3 * N), (N,) * 3)
    for given in (None, mixture):
        with torch.no_grad():
            found, expected = (
                model.condition(tokens, classes, masking, codes, every, mixture=given) for model in (learned, bits)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", ["dc_sa", "dc_ca"])
def test_prefix_guidances_see_every_code_and_where_it_stands(guidance: str) -> None:
    model = build(guidance)
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12] * 3)
    base = z_of(model, tokens, labels, codes, masking)
    visible_changed = torch.where(masking.masked, codes, codes ^ 31)
    assert not torch.allclose(base, z_of(model, tokens, labels, visible_changed, masking), atol=1e-5)
    assert not torch.allclose(base, z_of(model, tokens, labels, codes.roll(1, 1), masking), atol=1e-5)


@pytest.mark.parametrize("guidance", ["dc_mix", "dc_sa", "dc_ca"])
def test_dropped_codes_say_nothing(guidance: str) -> None:
    model = build(guidance)
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12] * 3)
    dropped = torch.full_like(codes, -1)
    a = z_of(model, tokens, labels, dropped, masking)
    assert not torch.allclose(a, z_of(model, tokens, labels, codes, masking), atol=1e-5)
    assert torch.equal(a, z_of(model, tokens, labels, dropped - 5, masking))  # which code was dropped cannot matter


@pytest.mark.parametrize("guidance", ["dc_mix", "dc_sa", "dc_ca"])
def test_tokens_mixed_in_the_model_are_those_of_ti_mix(guidance: str) -> None:
    model = build(guidance)
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12] * 3)
    rho = rng.uniform(0, Stream.RHO, torch.arange(3), N)
    mixture = Mixture(codes ^ 31, rho, torch.tensor([0.4]))
    classes, every = model.class_embedding(labels), Wanted(torch.arange(3 * N), (N,) * 3)
    with torch.no_grad():
        found = model.condition(tokens, classes, masking, codes, every, mixture=mixture)
        expected = model.condition(tokens, classes, masking, ti_mix(codes, codes ^ 31, masking.masked, rho, 0.4), every)
        assert not torch.allclose(found, model.condition(tokens, classes, masking, codes, every), atol=1e-4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("guidance", ["dc_mix", "dc_sa", "dc_ca"])
def test_the_codes_parameters_are_read_in_their_own_module_s_forward(guidance: str) -> None:
    model = build(guidance)
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12] * 3)
    expected = z_of(model, tokens, labels, codes, masking)
    owner = model.code_proj if guidance == "dc_mix" else model.code_emb
    whole = {name: parameter.data for name, parameter in owner.named_parameters()}

    def gather(*_) -> None:  # what ZeRO-3 and FSDP do before a module's forward, and undo after it
        for name, parameter in owner.named_parameters():
            parameter.data = whole[name]

    def scatter(*_) -> None:
        for parameter in owner.parameters():
            parameter.data = torch.empty(0)

    scatter()
    owner.register_forward_pre_hook(gather)
    owner.register_forward_hook(scatter)
    assert torch.equal(z_of(model, tokens, labels, codes, masking), expected)


def test_class_drop_is_the_null_embedding() -> None:
    model = build("none")
    labels = torch.tensor([0, 1, 2])
    classes = model.class_embedding(labels, torch.tensor([True, False, True]))
    assert torch.equal(classes[0], model.fake_latent[0]) and torch.equal(classes[2], model.fake_latent[0])
    assert torch.equal(classes[1], model.class_emb.weight[1])


def test_loss_at_the_start_is_that_of_a_zero_prediction() -> None:
    model = build("dc_mix", dropout=0.0)
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12, 13, 16])
    rows = sum([12, 13, 16])
    noise = torch.randn(2, rows, C, generator=torch.Generator().manual_seed(1))
    t = torch.randint(1, 1000, (2, rows), generator=torch.Generator().manual_seed(2))
    losses = model(tokens, labels, masking, codes, t, noise)
    torch.testing.assert_close(losses.mse, noise.square().mean(-1))
    expected = ((losses.mse + losses.vb).mean(0) * masking.row_weights).sum()
    torch.testing.assert_close(losses.loss.detach(), expected)


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_every_parameter_learns(guidance: str) -> None:
    model = build(guidance, dropout=0.0).train()
    for name, parameter in model.named_parameters():  # away from the zeros that would stop gradients
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    tokens, labels, codes, order = inputs()
    masking = Masking.from_order(order, [12, 13, 14])
    noise, t = torch.randn(1, 39, C), torch.randint(0, 1000, (1, 39))
    given = None if guidance == "none" else codes
    model(tokens, labels, masking, given, t, noise, torch.tensor([True, False, False])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_initial_weights_do_not_depend_on_what_else_there_is() -> None:
    small, large = build("dc_mix"), build("dc_mix", decoder_depth=3)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, dict(large.named_parameters())[name]), name


def test_every_guidance_has_a_class() -> None:
    assert tuple(CLASSES) == GUIDANCES


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_every_part_of_a_guidance_has_its_first_value(guidance: str) -> None:
    model = build(guidance)
    held = list(model.guidance.parts())
    named = {name for name, _ in model.named_parameters() if name.partition(".")[0] in held}
    assert named == set(model.guidance.first_values)
    assert model.guidance.first_values.items() <= RULES.items()  # no other guidance starts one of that name otherwise


def test_a_parameter_without_a_first_value_is_an_error() -> None:
    model = build("dc_mix")
    model.register_parameter("learned_scale", torch.nn.Parameter(torch.empty(1, 1, 48)))
    with pytest.raises(KeyError, match="learned_scale"):
        init_weights(model, 0)
