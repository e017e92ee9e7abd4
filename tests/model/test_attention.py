"""One function for every attention kernel: what each is called with, and what it refuses before anything runs."""

import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixar.config import ATTENTIONS, load_config
from mixar.errors import UserError
from mixar.model import attention
from mixar.model.attention import KERNELS, Lengths, pack, prepare_attention

LENGTHS, MEMORY = (3, 5, 5, 1), (4, 4, 2, 2)
KEYS = torch.arange(sum(LENGTHS)) * 7919
HOPPER, AMPERE = (9, 0), (8, 0)


def attend(q, k, v, lengths, memory, *rest):
    """`attention.attend` of images with these token counts on a CPU."""
    pairs = (pack(counts, "auto", q.device, max(counts)) for counts in (lengths, memory))
    return attention.attend(q, k, v, *pairs, *rest)


def packed(heads: int = 2, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sum(rows), heads, width, generator=generator) for rows in (LENGTHS, MEMORY, MEMORY)]


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    outs = []
    for a, b, c in zip(q.split(LENGTHS), k.split(MEMORY), v.split(MEMORY)):
        weights = torch.softmax(torch.einsum("nhd,mhd->hnm", a, b) / a.shape[-1] ** 0.5, -1)
        outs.append(torch.einsum("hnm,mhd->nhd", weights, c))
    return torch.cat(outs)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Pretend that there is a card of a capability."""

    def set_card(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        return torch.device("cuda", 0)

    return set_card


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """A module of that name, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    vars(sys.modules[name]).update(content)


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_packed_images_attend_to_themselves(kernel: str) -> None:
    q, k, v = packed()
    torch.testing.assert_close(attend(q, k, v, LENGTHS, MEMORY, 0.0, kernel, None), one_by_one(q, k, v))


@pytest.mark.parametrize("kernel", [name for name, needs in KERNELS.items() if needs.backend is not None])
def test_torch_is_asked_for_the_kernel_that_was_named(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    called = []

    def spy(q, k, v, dropout_p):
        cuda = torch.backends.cuda
        enabled = {"math": cuda.math_sdp_enabled(), "flash": cuda.flash_sdp_enabled(),
                   "efficient": cuda.mem_efficient_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled()}  # fmt: skip
        called.append((q.shape, k.shape, dropout_p, [name for name, on in enabled.items() if on]))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(*packed(), LENGTHS, MEMORY, 0.25, kernel, None)
    backend = "flash" if kernel in ("fa3", "fa4") else kernel
    shapes = [((1, 2, 3, 8), (1, 2, 4, 8)), ((1, 2, 5, 8), (1, 2, 4, 8)), ((1, 2, 5, 8), (1, 2, 2, 8))]
    assert called[:3] == [(torch.Size(q), torch.Size(k), 0.25, [backend]) for q, k in shapes]
    assert len(called) == 4 and torch.backends.cuda.math_sdp_enabled()


def test_equal_lengths_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, dropout_p: shapes.append(q.shape) or q)
    x = torch.zeros(16, 2, 8)
    attend(x, x, x, (3, 5, 5, 3), (3, 5, 5, 3), 0.0, "auto", None)
    assert shapes == [(1, 2, 3, 8), (2, 2, 5, 8), (1, 2, 3, 8)]


def by_offsets(counts: tuple[int, ...]) -> Lengths:
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    return Lengths(None, offsets, max(counts) + 1)


def test_fa2_takes_images_of_all_lengths_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        calls.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k, dropout_p))
        return one_by_one(q, k, v)

    stand_in(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    q, k, v = packed()
    found = attention.attend(q, k, v, by_offsets(LENGTHS), by_offsets(MEMORY), 0.1, "fa2", None)
    assert calls == [([0, 3, 8, 13, 14], [0, 4, 8, 10, 12], 6, 5, 0.1)]
    torch.testing.assert_close(found, attend(q, k, v, LENGTHS, MEMORY, 0.0, "auto", None))


def test_a_card_takes_offsets_where_its_kernel_can() -> None:
    for kernel in KERNELS:
        assert pack((3, 5), kernel, torch.device("cpu"), 5) == Lengths((3, 5), None, 5)
    for kernel in ("math", "cudnn"):
        assert pack((3, 5), kernel, torch.device("cuda"), 5) == Lengths((3, 5), None, 5)


def test_a_card_without_such_kernels_leaves_the_choice_to_torch(card) -> None:
    turing = card((7, 5))
    assert pack((3, 5), "auto", turing, 5) == Lengths((3, 5), None, 5)
    assert "images of one length together" in prepare_attention("auto", turing)
    assert "images of all lengths in one call" in prepare_attention("auto", card(AMPERE))


@pytest.mark.parametrize(
    ("kernel", "width", "asked"),
    [("auto", 64, "flash"), ("auto", 192, "flash"), ("auto", 256, "efficient"), ("auto", 1024, "efficient"),
     ("flash", 256, "flash"), ("efficient", 64, "efficient")],
)  # fmt: skip
def test_wide_heads_go_to_a_kernel_that_takes_them(kernel: str, width: int, asked: str) -> None:
    names = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.empty(n, 2, width, dtype=torch.bfloat16, device="meta") for n in (14, 12, 12))
    with Calls():
        attention.attend(q, k, v, by_offsets(LENGTHS), by_offsets(MEMORY), 0.1, kernel, None)
    assert [name for name in names if "attention" in name] == [f"aten::_{asked}_attention_forward"]


def test_further_images_attend_to_the_last_row() -> None:
    merged = Lengths((3, 5, 2, 1), None, 5).merged(2)
    assert merged.counts == (3, 8)
    assert by_offsets((3, 5, 2, 1)).merged(2).offsets.tolist() == [0, 3, 11]


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_compiles_to_one_graph(kernel: str) -> None:
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for dropout, keys in ((0.0, None), (0.5, KEYS)):
        given = (*packed(), LENGTHS, MEMORY, dropout, kernel, keys)
        torch.testing.assert_close(compiled(*given), attend(*given))


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_on_a_cpu_an_image_s_keys_decide_what_is_dropped(kernel: str) -> None:
    q, k, v = packed()
    together = attend(q, k, v, LENGTHS, MEMORY, 0.5, kernel, KEYS)
    parts = zip(q.split(LENGTHS), k.split(MEMORY), v.split(MEMORY), KEYS.split(LENGTHS), LENGTHS, MEMORY)
    alone = [attend(a, b, c, (n,), (m,), 0.5, kernel, keys) for a, b, c, keys, n, m in parts]
    torch.testing.assert_close(together, torch.cat(alone))  # whatever an image is packed with
    torch.testing.assert_close(attend(q, k, v, LENGTHS, MEMORY, 0.0, kernel, KEYS), one_by_one(q, k, v))
    assert not torch.allclose(together, attend(q, k, v, LENGTHS, MEMORY, 0.5, kernel, KEYS + 1))


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in ("auto", "math")])
def test_a_cpu_is_refused_with_the_card_that_is_needed(kernel: str) -> None:
    with pytest.raises(UserError, match=rf"{kernel} needs a .* card.*, not a CPU: write model.attention=auto"):
        prepare_attention(kernel, torch.device("cpu"))


def test_cards_that_a_kernel_does_not_run_on(card) -> None:
    for kernel in ("fa3", "fa4"):
        with pytest.raises(UserError, match=r"needs a Hopper .*, not a card"):
            prepare_attention(kernel, card(AMPERE))
    with pytest.raises(UserError, match="Ampere"):
        prepare_attention("fa2", card((7, 5)))
    assert "(cudnn)" in prepare_attention("cudnn", card(AMPERE))


@pytest.mark.parametrize("kernel", ["fa2", "fa3", "fa4"])
def test_a_missing_or_broken_package_is_named(monkeypatch: pytest.MonkeyPatch, card, kernel: str) -> None:
    with pytest.raises(UserError, match=r"needs (flash-attn 2|FlashAttention-[34]), .*No module named 'flash_attn"):
        prepare_attention(kernel, card(HOPPER))
    stand_in(monkeypatch, KERNELS[kernel].module)
    with pytest.raises(UserError, match="has no attribute"):
        prepare_attention(kernel, card(HOPPER))


@pytest.mark.parametrize("kernel", ["fa3", "fa4"])
def test_torch_is_told_of_the_flash_attention_to_use(monkeypatch: pytest.MonkeyPatch, card, kernel: str) -> None:
    told = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", told.append, raising=False)
    stand_in(monkeypatch, KERNELS[kernel].module, **{KERNELS[kernel].name: None})
    assert kernel in prepare_attention(kernel, card(HOPPER)) and told == [kernel.upper()]
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(UserError, match="newer torch"):
        prepare_attention(kernel, card(HOPPER))


def test_the_usual_choice_is_torch_s() -> None:
    assert prepare_attention("auto", torch.device("cpu")).startswith("torch's scaled_dot_product_attention")
    assert tuple(KERNELS) == ATTENTIONS


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.attention=fa3"], "write model.dropout=0, or model.attention=fa2"),
        (["model.attention=fa2", "train.precision=fp32"], "write train.precision=bf16"),
        (["model.attention=fa1"], "write one of auto, math, efficient"),
    ],
)
def test_the_config_refuses_what_a_kernel_lacks(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, overrides)
    assert load_config(None, ["model.attention=fa4", "model.dropout=0"]).model.attention == "fa4"
