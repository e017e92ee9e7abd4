"""The reference that `make bench` times is the algorithm: with our weights it gives our numbers."""

import torch

from benchmarks.reference import MAR, Diffusion, evenly_spaced
from mixar.config import ModelConfig, SampleConfig
from mixar.mixing import Masking
from mixar.model import Diffusion as Process
from mixar.model import MixAR
from mixar.sampling.autoregressive import denoise, reveal_schedule

CFG = ModelConfig(
    guidance="none", grid=4, latent_channels=4, code_bits=1, classes=5, class_tokens=3, head_depth=2, head_width=24,
    encoder_width=32, encoder_depth=2, encoder_heads=2, decoder_width=32, decoder_depth=2, decoder_heads=2,
)  # fmt: skip


def both() -> tuple[MixAR, MAR]:
    torch.manual_seed(0)
    ours, reference = MixAR(CFG).eval(), MAR(32, 2, 2, 2, 24, 4, grid=4, buffer=3, classes=5).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def test_the_training_loss_of_the_reference() -> None:
    ours, reference = both()
    tokens, labels, orders = torch.randn(3, 16, 4), torch.arange(3), reference.orders(3)
    t, noise = torch.randint(0, 1000, (4 * 48,)), torch.randn(4 * 48, 4)
    expected = reference.loss(tokens, reference.class_emb(labels), reference.mask(orders, 12), t, noise)
    masking = Masking.from_order(orders, [12] * 3)
    rows = masking.masked_rows
    found = ours(tokens, labels, masking, None, t.view(4, -1)[:, rows], noise.view(4, -1, 4)[:, rows])
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)


def test_the_sampling_of_the_reference() -> None:
    ours, reference = both()
    z, initial, noises = torch.randn(14, 32), torch.randn(7, 4), torch.randn(9, 14, 4)
    with torch.no_grad():
        process = Diffusion(evenly_spaced(9))
        expected = process.sample(reference.diffloss["net"], z, initial.repeat(2, 1), 2.5, noises)[:7]
        steps = denoise(ours.diffloss.net, Process("9"), z, 2.5, initial, lambda done: noises[done][:7], SampleConfig())
        *_, found = steps
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    asked: list[int] = []
    head = reference.diffloss["net"]
    head.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    assert reference.sample(torch.arange(3), 5, 2, 3.0).isfinite().all()
    revealed = [step.before - step.after for step in reveal_schedule(16, SampleConfig(steps=5))]
    assert asked[::2] == [2 * 3 * count for count in revealed], "conditional and unconditional rows of three images"
