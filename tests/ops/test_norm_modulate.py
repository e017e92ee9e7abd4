"""norm_modulate: the CPU kernel and the reference against float64, and what torch asks of an operator."""

import pytest
import torch
from kernels import BF16, F32, NORM_SIZES, NORM_TYPES, assert_norm, norm_inputs
from torch.library import opcheck

from mixar.ops import norm_modulate
from mixar.ops.norm_modulate import reference


@pytest.mark.parametrize("types", NORM_TYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [*NORM_SIZES, (0, 8), (130, 512)])  # the last one in three parts
def test_kernel_and_reference_against_float64(native: None, rows: int, width: int, types) -> None:
    for given in (norm_inputs(rows, width, types), norm_inputs(rows, width, types, affine=False, parts=2)):
        found = norm_modulate(*given)
        assert found.is_contiguous()
        assert_norm(found, given)
        assert_norm(reference(*given), given)


def test_bfloat16_is_float32_rounded_once(native: None) -> None:
    *given, _ = norm_inputs(9, 264, (BF16, BF16, F32))
    assert torch.equal(norm_modulate(*given, BF16), norm_modulate(*given, F32).bfloat16())


def test_autocast_changes_nothing(native: None) -> None:
    given = norm_inputs(5, 40, (BF16, BF16, F32))
    with torch.autocast("cpu", BF16):
        inside, plain = norm_modulate(*given), reference(*given)
    assert torch.equal(inside, norm_modulate(*given)) and plain.dtype == F32
    torch.testing.assert_close(plain, inside)


def test_strides_do_not_matter(native: None) -> None:
    x, weight, bias, shift, scale, *rest = norm_inputs(6, 12)
    expected = norm_modulate(x, weight, bias, shift, scale, *rest)
    across = lambda value: value.T.contiguous().T
    every_other = torch.stack([weight, bias], 1)
    found = norm_modulate(across(x), *every_other.unbind(1), across(shift), across(scale), *rest)
    assert torch.equal(found, expected)
    one = shift[:1].expand(6, 12)
    found = norm_modulate(x, weight, bias, one, scale, *rest)
    assert torch.equal(found, norm_modulate(x, weight, bias, one.contiguous(), scale, *rest))


def test_rows_do_not_depend_on_the_others_or_on_threads(native: None) -> None:
    x, weight, bias, shift, scale, *rest = norm_inputs(300, 520)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = norm_modulate(x, weight, bias, shift, scale, *rest)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[7:9], norm_modulate(x[7:9], weight, bias, shift[7:9], scale[7:9], *rest))


def test_opcheck(native: None) -> None:
    for types in NORM_TYPES:
        opcheck(torch.ops.mixar.norm_modulate.default, norm_inputs(5, 24, types))
        opcheck(torch.ops.mixar.norm_modulate.default, norm_inputs(5, 24, types, affine=False, parts=2))


def test_inductor_compiles(native: None) -> None:
    x, weight, bias, _, _, eps, dtype = norm_inputs(6, 24)
    wide = torch.randn(6, 72)

    def f(x, wide):
        shift, scale, gate = (2 * wide).chunk(3, -1)
        return norm_modulate(x + 1, weight, bias, shift, scale, eps, dtype) * gate

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows in (6, 3):
        torch.testing.assert_close(compiled(x[:rows], wide[:rows]), f(x[:rows], wide[:rows]))


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        (0, torch.zeros(3, 4, 8), "x"),
        (1, torch.zeros(7), "weight"),
        (2, torch.zeros(8, dtype=BF16), "bias float32"),
        (3, torch.zeros(2, 8), "shift"),
        (4, torch.zeros(3, 7), "scale"),
        (4, torch.zeros(3, 8, dtype=BF16), "one type"),
        (6, torch.float64, "no CPU kernel"),
    ],
)
def test_misfits_are_refused(native: None, at: int, value, told: str) -> None:
    given = list(norm_inputs(3, 8))
    given[at] = value
    with pytest.raises(RuntimeError, match=told):
        torch.ops.mixar.norm_modulate(*given)
