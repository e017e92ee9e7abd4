"""mix_gather: the reference against Eqs. 9 and 12 spelled out, the CPU kernel against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernels import BF16, CASES, F32, F64, TYPES, Inputs, assert_close, make_inputs
from torch.library import opcheck

from mixar.ops import mix_gather
from mixar.ops.mix_gather import backward_reference, reference


def spelled_out(x: Inputs) -> torch.Tensor:
    """Eqs. 9 and 12, position by position."""
    images, length = x.slots.shape
    out = torch.empty(images, length, x.positions.shape[1], dtype=F64)
    for b in range(images):
        for p in range(length):
            if x.slots[b, p] >= 0:
                token = x.encoded[x.slots[b, p]]
            else:
                i = p - length + x.codes.shape[1]
                code = x.codes[b, i] if x.drawn is None or x.rho[b, i] < x.share else x.drawn[b, i]
                if x.bias is None:
                    token = x.weight[code] if code >= 0 else torch.zeros(())
                else:
                    signs = [0 if code < 0 else 2 * (int(code) >> k & 1) - 1 for k in range(x.bits)]
                    token = x.weight.double() @ torch.tensor(signs, dtype=F64) + x.bias
            out[b, p] = token.double() + x.positions[p].double()
    return out


def call(x: Inputs) -> torch.Tensor:
    return mix_gather(x.encoded, x.slots, x.codes, x.weight, x.bias, x.positions, x.drawn, x.rho, x.share)


def leaves(x: Inputs) -> list[torch.Tensor]:
    return [leaf.requires_grad_() for leaf in (x.encoded, x.weight, x.bias, x.positions) if leaf is not None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_reference_is_the_equation(case: dict) -> None:
    x = make_inputs(**case, types=(F64, F64))
    torch.testing.assert_close(reference(*x.all()), spelled_out(x))


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_cpu_kernel_against_float64(native: None, case: dict, types: tuple[torch.dtype, torch.dtype]) -> None:
    x = make_inputs(**case, types=types)
    out, grad, truths = x.truth()
    found = call(x)
    assert found.dtype == types[1]
    assert_close(found, out, 1 + max(x.bits, 0))
    for name, value, truth in zip("ewbp", leaves(x), truths):
        value.grad = None
        d_value = torch.autograd.grad(call(x), value, grad)[0]
        if x.bias is None and name == "w" and types[1] == BF16:  # torch's scatter on the CPU adds in bfloat16
            torch.testing.assert_close(d_value.double(), truth, rtol=2**-6, atol=2**-5)
        else:
            assert_close(d_value, truth, x.slots.numel() if name != "e" else 1)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: "-".join(map(str, case.values())))
def test_backward_reference_against_float64(case: dict, types: tuple[torch.dtype, torch.dtype]) -> None:
    x = make_inputs(**case, types=types)
    _, grad, (d_encoded, d_weight, d_bias, d_positions) = x.truth()
    given = (grad, *x.all()[1:6], len(x.encoded), types[0], x.bits)
    found = backward_reference(*given)
    assert_close(found[0], d_encoded)
    assert_close(found[1], d_positions, len(x.slots))
    scale = 2**-8 if types[1] == BF16 else 1e-5
    torch.testing.assert_close(found[2].double(), torch.cat([d_weight.T, d_bias[None]]), rtol=scale, atol=30 * scale)


def test_gradcheck(native: None) -> None:
    for table in (False, True):
        x = make_inputs(images=2, n=3, prefix=1, width=3, bits=2, table=table, types=(F64, F64))
        inputs = leaves(x)
        assert torch.autograd.gradcheck(lambda *_, x=x: call(x), inputs)


@pytest.mark.parametrize("case", CASES[1:9:3], ids=lambda case: "-".join(map(str, case.values())))
def test_opcheck(native: None, case: dict) -> None:
    x = make_inputs(**case)
    opcheck(torch.ops.mixar.mix_gather.default, x.all())
    leaves(x)
    opcheck(torch.ops.mixar.mix_gather.default, x.all())
    grad = torch.randn(*x.slots.shape, x.positions.shape[1])
    opcheck(torch.ops.mixar.mix_gather_backward.default, (grad, *x.all()[1:6], len(x.encoded), F32, x.bits))


def test_compiles_to_one_graph_whatever_lambda_is(native: None) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    x = make_inputs()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for value in (1.0, 0.7, 0.5, 0.2, 0.0):
        x.share = torch.tensor([value])
        torch.testing.assert_close(compiled(x), call(x))
    assert len(graphs) == 1


def test_inductor_compiles_forward_and_backward(native: None) -> None:
    x = make_inputs(width=16)
    inputs = leaves(x)
    given = [x.slots, x.codes, x.drawn, x.rho, x.share]

    def f(encoded, weight, bias, positions, slots, codes, drawn, rho, share):
        return mix_gather(encoded, slots, codes, weight, bias, positions, drawn, rho, share)

    found, expected = torch.compile(f, fullgraph=True)(*inputs, *given), f(*inputs, *given)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        assert torch.equal(a, b)


def test_autocast_changes_nothing(native: None) -> None:
    x = make_inputs(types=(BF16, F32))
    with torch.autocast("cpu", torch.bfloat16):
        inside, plain = call(x), reference(*x.all())
    assert inside.dtype == plain.dtype == F32
    torch.testing.assert_close(inside, call(x), rtol=0, atol=0)
    torch.testing.assert_close(plain, inside)


def test_mixed_types_meet_in_the_wider(native: None) -> None:
    x = make_inputs(types=(F32, F32))
    x.weight, x.positions = x.weight.bfloat16(), x.positions.bfloat16()
    assert call(x).dtype == F32
    x.positions = x.positions.double()
    assert call(x).dtype == F64


def test_strides_do_not_matter(native: None) -> None:
    x = make_inputs(images=4, width=12)
    expected = call(x)
    for name, value in vars(x).items():
        if name in ("encoded", "slots", "codes", "drawn", "rho", "weight", "positions"):
            setattr(x, name, value.T.contiguous().T)
    torch.testing.assert_close(call(x), expected, rtol=0, atol=0)
    inputs = leaves(x)
    whole = torch.ones(1, 1, 1).expand(expected.shape)  # what .sum() sends back
    for a, b in zip(torch.autograd.grad(call(x), inputs, whole), torch.autograd.grad(call(x), inputs, whole.clone())):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("positions", torch.zeros(8, 33), "slots"),
        ("encoded", torch.zeros(13, 32), "encoded"),
        ("weight", torch.zeros(32, 5), "weight"),
        ("weight", torch.zeros(33, 25), "more than 24"),
        ("rho", None, "come together"),
        ("codes", torch.zeros(3, 6, dtype=torch.int64), "codes"),
        ("encoded", torch.zeros(1, 33), "slot"),
    ],
)
def test_misfits_are_refused(native: None, name: str, value: torch.Tensor | None, told: str) -> None:
    x = make_inputs()
    setattr(x, name, value)
    with pytest.raises(RuntimeError, match=told):
        call(x)


def test_an_id_outside_the_table_is_refused(native: None) -> None:
    x = make_inputs(bits=3, table=True, seen=0.0, mix=False)
    x.codes[1, 2] = 8
    with pytest.raises(RuntimeError, match="id 8 in a table of 8"):
        call(x)


def test_sums_do_not_depend_on_threads(native: None) -> None:
    x = make_inputs(images=6, n=40, width=65, bits=14)
    inputs, grad = leaves(x), torch.randn(*x.slots.shape, 65)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(call(x), inputs, grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def allocated(work) -> list[int]:
    """Bytes of every allocation that `work` makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return sorted((e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0), reverse=True)


def test_no_temporary_of_the_output_s_size(native: None) -> None:
    x = make_inputs(images=8, n=256, prefix=64, width=256, bits=14)
    inputs = leaves(x)
    out = call(x)
    size = out.numel() * out.element_size()
    forward = allocated(lambda: call(x))
    assert forward[0] == size and sum(forward[1:]) < size / 10
    grad = torch.randn_like(out)
    backward = allocated(lambda: torch.autograd.grad(out, inputs, grad))
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in inputs)
    assert sum(backward) < gradients + size / 10
    assert allocated(lambda: F.pad(out.detach(), (0, 1)))[0] > size  # the profiler sees such a temporary
