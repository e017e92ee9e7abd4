"""`python benchmarks/count.py CONFIG [key=value ...]`: what a training step costs on a GPU, counted without one.

One micro-batch of the objective's real loss, forward and backward, and the optimizer's step run at full size on fake
CUDA tensors: shapes, types and dispatch are those of a GPU, and nothing is computed. Each ATen operator that is not a
view counts as one kernel, which reads its inputs and writes its outputs; an operator over a list of tensors counts as
one, too. A queue model turns the kernels into time: the host launches them one after the other, and the GPU runs them.
"""

import argparse
import copy
import inspect
import json
import math
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import IRNode, ReinterpretView
from torch._inductor.scheduler import ForeachKernelSchedulerNode
from torch._prims.rng_prims import graphsafe_run_with_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from mixar.cards import CARDS
from mixar.codecs import LatentNorm
from mixar.config import Config, images_per_pass, load_config
from mixar.data.batch import Batch
from mixar.dist import Place
from mixar.engine import build_engine
from mixar.errors import UserError
from mixar.gpu.synthetic import batch_of, changed
from mixar.mixing import masked_counts
from mixar.model import MixAR
from mixar.model.head import Head
from mixar.objectives import MixARObjective
from mixar.objectives.frozen import Frozen
from mixar.plan.work import Tokens, attention_flops, training_flops
from mixar.prior import Prior
from mixar.sampling.autoregressive import KeyedNoise, sample_steps, sampling_order

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
_ATTENTION = {
    "_flash_attention_forward", "_flash_attention_backward", "_efficient_attention_forward",
    "_efficient_attention_backward", "scaled_dot_product_attention", "scaled_dot_product_attention_backward",
}  # fmt: skip
_WITHOUT_KERNEL = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.detach.default, aten.lift_fresh.default, torch.ops.prim.device.default,
}  # fmt: skip

CARD = torch.device("cuda", 0)
PARTS = ("random", "dropout", "attention", "backbone", "head", "loss", "prior", "optimizer", "other")

# the queue model, of an H100
LAUNCH = 5e-6  # seconds of the host per kernel
LEAST = 2.2e-6  # seconds of the GPU per kernel
MEMORY = 2.85e12  # bytes/s, 85 % of the nominal
LARGE, SMALL, EDGE = 620e12, 450e12, 1e10  # FLOP/s of bf16 products of at least EDGE FLOP, and of smaller ones
FLOAT32 = 45e12  # FLOP/s of float32 products
ATTENTION = 150e12  # FLOP/s of attention in sequences of a few hundred tokens
ASSUMPTIONS = [
    f"the host launches a kernel in {1e6 * LAUNCH:g} µs and never waits, but for what is listed as blocking",
    f"a kernel takes at least {1e6 * LEAST:g} µs; else its bytes at {MEMORY / 1e12:g} TB/s, each tensor read or "
    "written once",
    f"products in bf16 run at {LARGE / 1e12:.0f} TFLOP/s, those below {EDGE / 1e9:.0f} GFLOP at {SMALL / 1e12:.0f}, in "
    f"float32 at {FLOAT32 / 1e12:.0f}; attention at {ATTENTION / 1e12:.0f}",
    "an operator that is not a view is one kernel, also where it is several, such as a sort, or runs over a list",
]


@dataclass
class Kernel:
    """An operator that a GPU would run; `seconds` are the GPU's, without the launch."""

    name: str
    part: str
    backward: bool
    moved: int  # bytes read and written
    flops: float  # of products, whose bytes count in their time only
    seconds: float


class Trace(TorchDispatchMode):
    """Runs operators of the host as they are, and those of the card on fake tensors, of which it keeps a list.

    Attributes:
        kernels: in the order of their launches.
        blocking: file and line of each place where the host waits for the device, or the device for the host's memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kernels: list[Kernel] = []
        self.blocking: list[str] = []
        self.made_by: dict[int, str] = {}  # autograd's sequence number to the part that made the node
        self.backward_part: str | None = None
        self.compiled_part = "other"
        self.pinned: list[Tensor] = []
        self.cast: set[int] = set()  # parameters that autocast has cast, and keeps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        asked = kwargs.get("device")
        if func is aten._pin_memory.default or func is aten.is_pinned.default:
            if func is aten._pin_memory.default:
                self.pinned.append(args[0])
            return any(x is args[0] for x in self.pinned) if func is aten.is_pinned.default else args[0]
        if not any(x.is_cuda for x in inputs) and (asked is None or torch.device(asked).type != "cuda"):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default or (func is aten._to_copy.default and asked is not None):
            self._crossing(func, inputs[0], kwargs)
        if func is aten._local_scalar_dense.default:
            return 1.0 if inputs[0].dtype.is_floating_point else 1
        self._index_on_host(func, args)
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
            out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._record(func, inputs, outputs, args, kwargs)
        return out

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _crossing(self, func: Any, source: Tensor, kwargs: dict[str, Any]) -> None:
        """Note a copy between host and device that waits: memory of the host that is not pinned, or a value read."""
        to = kwargs.get("device")
        same = to is not None and torch.device(to).type == source.device.type
        waits = not kwargs.get("non_blocking", False) or not (source.is_cuda or any(x is source for x in self.pinned))
        if not same and waits:
            self.blocking.append(f"{_place()} {func}")

    def _index_on_host(self, func: Any, args: Any) -> None:
        """Note indices that lie on the host, and booleans, whose number of elements the host must know."""
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten.nonzero.default):
            indices = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
            if func is aten.nonzero.default or any(not x.is_cuda or x.dtype == torch.bool for x in indices):
                self.blocking.append(f"{_place()} {func}")

    def _record(self, func: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any) -> None:
        part = self.backward_part or _part()
        if self.backward_part is None:
            self.made_by.setdefault(torch._C._autograd._get_sequence_nr(), part)  # the first operator after its node
        if func is aten._to_copy.default and isinstance(inputs[0], nn.Parameter) and self.backward_part is None:
            if id(inputs[0]) in self.cast:
                return
            self.cast.add(id(inputs[0]))
        if func in _WITHOUT_KERNEL or _is_view(func) or not (outputs or func._schema.is_mutable):
            return
        written = outputs or _written(func, args, kwargs)
        moved = sum(map(_bytes, {id(x): x for x in inputs}.values())) + sum(map(_bytes, written))
        flops = _product_flops(func, args)
        if _name(func) in _ATTENTION:
            part = "attention"
        elif "dropout" in _name(func) and part != "random":
            part = "dropout"
        seconds = _seconds(moved, flops, written[0].dtype)
        self.kernels.append(Kernel(_name(func), part, self.backward_part is not None, moved, flops, seconds))

    def clear(self) -> None:
        """Forget the kernels and waits so far."""
        self.kernels.clear()
        self.blocking.clear()
        self.pinned.clear()

    def launch(self, kernels: Sequence[Kernel]) -> None:
        """Count the kernels of a compiled graph."""
        part = self.backward_part or self.compiled_part
        back = self.backward_part is not None
        self.kernels += [replace(k, part=k.part or part, backward=back) for k in kernels]

    @contextmanager
    def backward(self, node: Any) -> Iterator[None]:
        """Count what runs inside as the backward pass of an autograd node."""
        before, number = self.backward_part, node._sequence_nr() + 1
        self.backward_part = self.made_by.get(number, self.made_by.get(number - 1, "other"))
        try:
            yield
        finally:
            self.backward_part = before


def _seconds(moved: int, flops: float, dtype: torch.dtype | None) -> float:
    """Of the GPU: a product's operations, or the bytes."""
    rate = FLOAT32 if dtype == torch.float32 else LARGE if flops >= EDGE else SMALL
    return max(LEAST, moved / MEMORY, flops / rate)


def _name(func: Any) -> str:
    return str(func).removeprefix("aten.").rpartition(".")[0]


def _is_view(func: Any) -> bool:
    return bool(func.is_view) or func._schema.name == "aten::_unsafe_view"


def _bytes(x: Tensor) -> int:
    """Bytes of the elements; those that an expanded tensor repeats count once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= 1 if stride == 0 else size
    return elements * x.element_size()


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator without outputs writes to."""
    named = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    return [x for a, value in named if a.alias_info is not None and a.alias_info.is_write
            for x in tree_leaves(value) if isinstance(x, Tensor)]  # fmt: skip


def _product_flops(func: Any, args: Any) -> float:
    """FLOP of a matrix product, 0 for other operators."""
    first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(_name(func))
    if first is None:
        return 0.0
    left, right = args[first], args[first + 1]
    return 2.0 * left.numel() * right.shape[-1]


_FILES = {
    "rng.py": "random", "ops/random.py": "random", "model/dropout.py": "dropout", "model/attention.py": "backbone",
    "model/blocks.py": "backbone", "model/guidance.py": "backbone", "model/head.py": "head", "model/process.py": "loss",
    "model/diffusion.py": "loss", "model/flow.py": "loss", "model/mixar.py": "backbone", "objectives/mixar.py": "loss",
    "objectives/base.py": "loss", "mixing/masking.py": "loss", "codecs/latents.py": "loss", "prior/lfqbert.py": "prior",
    "prior/sampling.py": "prior", "sampling/autoregressive.py": "loss",
}  # fmt: skip
_STEP = {"_update", "_update_ema"}  # the engine's functions after the passes


def _frames() -> Iterator[tuple[str, FrameType]]:
    """The frames of mixar's own code, innermost first, each with its file's path inside the package."""
    frame: FrameType | None = sys._getframe(1)
    package = str(ROOT / "mixar") + "/"
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(package):
            yield file.removeprefix(package), frame
        frame = frame.f_back


def _part() -> str:
    for file, frame in _frames():
        if file in _FILES:
            return _FILES[file]
        if file.startswith("engine/") and frame.f_code.co_name in _STEP:
            return "optimizer"
    return "other"


def _place() -> str:
    """File and line of mixar's innermost call, or of that of another program outside of torch."""
    for file, frame in _frames():
        return f"mixar/{file}:{frame.f_lineno}"
    frame: FrameType | None = sys._getframe(1)
    libraries = str(Path(torch.__file__).parent), __file__
    while frame is not None and frame.f_code.co_filename.startswith(libraries):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def run_backward(
    trace: Trace, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], keep_graph: bool, create_graph: bool,
    inputs: Sequence[Tensor] = (), *flags: bool, **options: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Autograd node by node, in place of its own engine, which asks a driver for the streams of a card."""
    edges = [get_gradient_edge(x) for x in inputs]
    wanted = {edge.node for edge in edges}
    found: dict[tuple[Any, int], Tensor] = {}
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    roots = []
    for output, grad in zip(outputs, gradients):
        edge = get_gradient_edge(output)
        roots.append(edge.node)
        grads[edge.node][edge.output_nr] = torch.ones_like(output) if grad is None else grad
    uses = _uses(roots, wanted)
    ready = [node for node in dict.fromkeys(roots) if uses[node] == 0]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = grads.pop(node, {})
            if node in wanted:  # no input was made of another one
                found |= {(node, slot): grad for slot, grad in given.items()}
                continue
            with trace.backward(node):
                outs = _apply(node, given)
                for (after, slot), grad in zip(node.next_functions, outs):
                    if after is not None and grad is not None:
                        grad, held = _fitting(grad, after, slot), grads[after]
                        held[slot] = held[slot] + grad if slot in held else grad
            for after, _ in node.next_functions:
                uses[after] -= 1
                if after is not None and uses[after] == 0:
                    ready.append(after)
    return tuple(found.get((edge.node, edge.output_nr)) for edge in edges)


def _uses(roots: list[Any], ends: set[Any]) -> Counter[Any]:
    """How many nodes hand a gradient to each node, up to those at the `ends`."""
    uses: Counter[Any] = Counter()
    seen, stack = set(roots), list(dict.fromkeys(roots))
    while stack:
        node = stack.pop()
        for after, _ in node.next_functions if node not in ends else ():
            if after is not None:
                uses[after] += 1
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
    return uses


def _apply(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    if hasattr(node, "variable"):  # where a gradient ends
        if given:
            leaf = node.variable
            leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
        return ()
    inputs = [given.get(i) for i in range(len(node._input_metadata))]
    run = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
    outs = run(*inputs)
    return outs if isinstance(outs, tuple) else (outs,)


def _fitting(grad: Tensor, node: Any, slot: int) -> Tensor:
    """A gradient in the shape and type of what it belongs to, as autograd's engine makes it."""
    wanted = node._input_metadata[slot]
    if grad.shape != torch.Size(wanted.shape):
        grad = grad.sum_to_size(wanted.shape)
    return grad if grad.dtype == wanted.dtype else grad.to(wanted.dtype)


class Scheduled(Exception):
    """Ends a compilation where inductor has decided on its kernels, and would write them for a card.

    Attributes:
        kernels: without the part of the step that they belong to.
    """

    def __init__(self, graph: GraphLowering) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        self.kernels = [kernel for node in graph.scheduler.nodes if (kernel := _scheduled(node)) is not None]


def _moved(node: Any) -> int:
    """Bytes that a node of inductor's schedule reads and writes; of columns of a wider buffer those columns alone.

    A combo kernel is several kernels in one launch, each of which reads for itself.
    """
    if isinstance(node, ForeachKernelSchedulerNode):
        return sum(map(_moved, node.snodes))
    pieces: dict[str, dict[Any, int]] = defaultdict(dict)  # by buffer and offset in it
    for dep in node.read_writes.reads_and_writes():
        if isinstance(dep, MemoryDep):
            pieces[dep.name][dep.get_offset()] = dep.numbytes_hint()
    for view in tree_leaves(getattr(getattr(node, "node", None), "inputs", ())):
        if isinstance(view, ReinterpretView):
            layout = view.get_layout()
            pieces[view.get_name()][layout.offset] = math.prod(map(int, layout.size)) * layout.dtype.itemsize
    if _draws_again(node):  # of which inductor counts no bytes
        tensors = [x for x in (*node.node.inputs, *node.node.outputs) if isinstance(x, IRNode) and x.maybe_get_size()]
        return sum(math.prod(map(int, x.get_size())) * x.get_dtype().itemsize for x in tensors)
    whole = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    return sum(min(size, sum(pieces[name].values()) or size) for name, size in whole.items())


def _draws_again(node: Any) -> bool:
    """Whether a node is an operator under the state of a generator, so that recomputation draws the same numbers."""
    return getattr(getattr(node, "node", None), "op_overload", None) is graphsafe_run_with_rng_state


def _scheduled(node: Any) -> Kernel | None:
    """The kernel of a node of inductor's schedule; None for a name of another one's output."""
    moved, extern = _moved(node), getattr(node, "node", None)
    if moved == 0:
        return None
    operator = getattr(extern, "op_overload", None)
    if _draws_again(node):
        assert extern is not None
        operator = next(x for x in extern.constant_args if isinstance(x, torch._ops.OpOverload))
    name = str(operator or "fused").removeprefix("aten.").partition(".")[0]
    flops, dtype = 0.0, None
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        assert extern is not None
        left, right = ([int(size) for size in x.get_size()] for x in extern.inputs[-2:])
        flops, dtype = 2.0 * math.prod(left) * right[-1], extern.get_dtype()
    part = "attention" if name in _ATTENTION else "random" if "rand" in name else ""
    return Kernel(name, part, False, moved, flops, _seconds(moved, flops, dtype))


class Graphs:
    """The graphs that torch.compile made of the blocks, up to inductor's schedule for an H100.

    Attributes:
        forward, backward: numbers of graphs.
        dynamic: number of graphs with a size that is a symbol.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.forward = self.backward = self.dynamic = 0
        self._compile = torch.compile
        # one for all blocks, else each would have a graph of its own
        self._backend = lambda module, inputs, options=None: compile_fx.compile_fx(
            module, inputs, inner_compile=self.inner, config_patches=options
        )

    def compile(self, function: Any, **options: Any) -> Any:
        """In place of torch.compile."""
        compiled = self._compile(function, backend=self._backend, **options)

        part = "head" if isinstance(getattr(inspect.unwrap(function), "__self__", None), Head) else "backbone"

        def run(*args: Any) -> Any:
            first = torch._C._autograd._get_sequence_nr()
            self.trace.compiled_part = part
            with _disable_current_modes(), self.trace.fake:
                out = compiled(*args)
            made = range(first + 1, torch._C._autograd._get_sequence_nr() + 1)
            self.trace.made_by |= dict.fromkeys(made, part)
            return out

        return run

    def inner(self, module: Any, inputs: Any, **options: Any) -> Any:
        """In place of inductor's compilation of one graph: it counts its kernels whenever the graph runs."""
        plain = copy.deepcopy(module)
        back = bool(options.get("is_backward"))
        self.backward += back
        self.forward += not back
        self.dynamic += any(isinstance(x, torch.SymInt) for x in inputs)
        kernels = None
        try:
            with _disable_current_modes(), DebugContext():
                compile_fx._InProcessFxCompile().codegen_and_compile(module, inputs, [], options)
        except Scheduled as end:
            kernels = end.kernels
        assert kernels is not None, "inductor did not come to its schedule"

        def run(args: list[Any]) -> Any:
            self.trace.launch(kernels)
            given = list(args)
            args.clear()
            with _disable_current_modes(), self.trace.fake:
                return plain(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


class Generator(torch.Generator):
    """In place of a card's, whose state a compiled graph takes to draw the same numbers once more."""

    device = CARD

    def clone_state(self) -> "Generator":
        return self

    def graphsafe_get_state(self) -> "Generator":
        return self

    def graphsafe_set_state(self, state: torch.Generator) -> "Generator":
        return self


H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
)  # fmt: skip


@contextmanager
def without_a_card(trace: Trace) -> Iterator[Graphs]:
    """Let torch, dynamo and inductor work for an H100 that is not there."""
    graphs = Graphs(trace)

    def end(graph: GraphLowering) -> None:
        raise Scheduled(graph)

    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "get_device_properties", lambda *device: H100),
        (torch.cuda, "get_device_capability", lambda *device: (H100.major, H100.minor)),
        (torch.cuda, "default_generators", (Generator(),)),
        (torch._C, "_accelerator_getDefaultGenerator", lambda index: torch.cuda.default_generators[index]),
        (CudaInterface, "get_device_properties", staticmethod(lambda *device: H100)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *device: 10 * H100.major)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *device: H100)),
        (torch._inductor.scheduler, "has_triton", lambda: True),
        (compile_fx, "_check_triton_bf16_support", lambda graph: None),
        (GraphLowering, "compile_to_module", end),
        (torch, "compile", graphs.compile),
        (torch.autograd, "_engine_run_backward", partial(run_backward, trace)),
        (torch.utils._foreach_utils, "_foreach_supported_types", [Tensor, nn.Parameter, FakeTensor]),
        (Frozen, "prior", property(prior_of)),
        (Place, "autocast", lambda place, precision: autocast(trace, precision)),
    ]
    settings = {"force_disable_caches": True, "joint_graph_constant_folding": False}
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        stack.enter_context(torch._inductor.config.patch(settings))
        yield graphs


class Fixed:
    """An objective as an engine's task, with weights that nobody computes."""

    def __init__(self, objective: MixARObjective) -> None:
        self.objective, self.build, self.decays = objective, objective.build, objective.decays

    def initial(self, name: str, like: Tensor) -> Tensor:
        return torch.empty(like.shape, device=CARD)

    def loss(self, model: nn.Module, batch: Batch, epoch: float) -> Any:
        return self.objective.loss(model, batch, epoch)


def prior_of(frozen: Frozen) -> Prior:
    """The prior of TI-Mix, with weights that nobody computes."""
    with torch.device("meta"):
        prior = Prior(frozen.cfg.prior).eval().to_empty(device=CARD)
    prior.to = lambda device: prior  # type: ignore[method-assign,assignment,return-value]  # it is there already
    return prior


@contextmanager
def autocast(trace: Trace, precision: str) -> Iterator[None]:
    """CUDA's autocast; torch.autocast would switch itself off without a card."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        trace.cast.clear()


def trace_step(cfg: Config, images: int, steps: int = 2) -> tuple[Trace, dict[str, int]]:
    """The last of `steps` steps of one micro-batch of `images` each, forward and backward, and the optimizer's step.

    The first step fills what is kept from step to step, and compiles. With TI-Mix it is the end of the run.

    Returns:
        the kernels; the numbers of compiled graphs, of those with a symbolic size, and of those made after the first
        step.
    """
    trace, epoch = Trace(), cfg.train.epochs if cfg.ti_mix.enabled else 0.0
    norm = LatentNorm(torch.zeros(cfg.model.latent_channels), torch.ones(cfg.model.latent_channels))
    made = 0
    torch._dynamo.reset()
    with without_a_card(trace) as graphs, trace:
        engine = build_engine(cfg, Fixed(MixARObjective(cfg, norm, CARD)), Place(0, 1, CARD))
        for step in range(steps):
            batch = batch_of(cfg, images, step, CARD)
            trace.clear()
            engine.step([batch], epoch)
            made = made or graphs.forward
    return trace, {"graphs": graphs.forward, "dynamic": graphs.dynamic, "recompiles": graphs.forward - made}


def trace_sampling(cfg: Config, diffusion_steps: int, images: int = 64) -> Trace:
    """The second autoregressive step of sampling, with that many diffusion steps, without compilation."""
    trace = Trace()
    settings = replace(cfg.sample, diffusion_steps=str(diffusion_steps), diffusion_steps_end=None)
    with without_a_card(trace), trace, autocast(trace, cfg.train.precision):
        with torch.device("meta"):
            model = MixAR(cfg.model).eval()
        model.to_empty(device=CARD)
        seeds, n = torch.empty(images, dtype=torch.int64, device=CARD), cfg.model.tokens
        codes = None if cfg.model.guidance == "none" else seeds[:, None].expand(-1, n)
        noise = KeyedNoise(seeds, n, cfg.model.token_dim, [diffusion_steps] * settings.steps)
        order = sampling_order(settings.order, seeds, n)
        steps = sample_steps(model, seeds, codes, order, noise, settings)
        next(steps)
        trace.clear()
        next(steps)
    return trace


def count(cfg: Config, steps: int = 2) -> dict[str, Any]:
    """All counts as plain values: of the passes, eager and compiled, of the optimizer's step, and of sampling."""
    images = images_per_pass(cfg, ranks=1)
    with_compile = lambda compile: changed(cfg, engine={"name": "ddp", "compile": compile})
    eager, _ = trace_step(with_compile(False), images)
    compiled, graphs = trace_step(with_compile(True), images, steps)
    update = [kernel for kernel in eager.kernels if kernel.part == "optimizer"]
    short, long = (len(trace_sampling(cfg, diffusion).kernels) for diffusion in (20, 30))
    return {
        "images": images,
        **passes(cfg, images, eager),
        "compiled": graphs | passes(cfg, images, compiled),
        "optimizer": {"kernels": len(update), "bytes": sum(kernel.moved for kernel in update)},
        "sampling": {"kernels_per_diffusion_step": (long - short) / 10, "kernels_besides": 3 * short - 2 * long},
    }


def passes(cfg: Config, images: int, trace: Trace) -> dict[str, Any]:
    """The counts of forward and backward pass, and the time that the queue model makes of them."""
    kernels = [kernel for kernel in trace.kernels if kernel.part != "optimizer"]
    by_part = Counter(kernel.part for kernel in kernels)
    with torch.device("meta"):
        model = MixAR(cfg.model)
    counts = masked_counts(cfg.mask, cfg.model.tokens, cfg.seed, range(images), images)
    tokens = Tokens.of(cfg.model, [cfg.model.tokens - masked for masked in counts], images)
    flops = images * sum(training_flops(model, tokens).values())
    flops += sum(kernel.flops for kernel in kernels if kernel.part == "prior")
    host = LAUNCH * len(kernels)
    device = sum(kernel.seconds for kernel in kernels if kernel.part != "attention")
    # forward, once more where it is recomputed, and twice that backward
    times = 3 + (cfg.engine.recompute in ("backbone", "all"))
    device += times * images * attention_flops(model, tokens) / ATTENTION
    return {
        "kernels": {"total": len(kernels)} | {part: by_part[part] for part in PARTS if part != "optimizer"},
        "attention_calls": {
            name: sum(kernel.part == "attention" and kernel.backward is back for kernel in kernels)
            for name, back in (("forward", False), ("backward", True))
        },
        "bytes_other": sum(k.moved for k in kernels if not k.flops and k.part != "attention"),
        "flops": flops,
        "blocking": sorted(set(trace.blocking)),
        "milliseconds": {"host": 1e3 * host, "device": 1e3 * device},
        "mfu": flops / max(host, device) / CARDS["h100"].bf16,
    }


def render(found: dict[str, Any]) -> str:
    """The counts as a table, with the assumptions of the queue model."""
    rows = [("", "eager", "compiled")]
    both = found, found["compiled"]
    for name, value in found["kernels"].items():
        rows.append((f"kernels, {name}", f"{value:,}", f"{both[1]['kernels'][name]:,}"))
    for name in ("forward", "backward"):
        rows.append((f"attention calls, {name}", *(str(side["attention_calls"][name]) for side in both)))
    rows.append(("GB besides products and attention", *(f"{side['bytes_other'] / 1e9:.0f}" for side in both)))
    for name in ("host", "device"):
        rows.append((f"ms of the {name}", *(f"{side['milliseconds'][name]:.0f}" for side in both)))
    rows.append(("share of an H100's peak (MFU)", *(f"{side['mfu']:.1%}" for side in both)))
    lines = [f"one micro-batch of {found['images']} images, {found['flops'] / 1e12:.1f} TFLOP"]
    lines += [f"  {name:<36}{eager:>10}{compiled:>10}" for name, eager, compiled in rows]
    lines += ["  waits of the host: " + ("; ".join(found["blocking"] + both[1]["blocking"]) or "none")]
    lines += ["  graphs {graphs}, of these dynamic {dynamic}, made after the first step {recompiles}".format(**both[1])]
    lines += [
        "  optimizer's step: {kernels} kernels, {0:.0f} GB".format(
            found["optimizer"]["bytes"] / 1e9, **found["optimizer"]
        )
    ]
    sampling = found["sampling"]
    lines += [f"  sampling: {sampling['kernels_per_diffusion_step']:.0f} kernels per diffusion step, and "
              f"{sampling['kernels_besides']:.0f} per autoregressive step"]  # fmt: skip
    return "\n".join([*lines, "assumptions, none of them measured", *(f"  - {line}" for line in ASSUMPTIONS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=2, help="compiled steps, over which recompilations are counted")
    parser.add_argument("--json", action="store_true", help="print plain values")
    args = parser.parse_intermixed_args()
    try:
        cfg = load_config(args.config, args.overrides)
        if cfg.task != "mixar":
            raise UserError(f"task={cfg.task} is not counted: name a config of task=mixar")
        if args.steps < 2:
            raise UserError(f"--steps {args.steps} has none after the one that compiles: write --steps 2 or more")
        found = count(cfg, args.steps)
    except UserError as error:
        sys.exit(f"count.py: {error}")
    print(json.dumps(found, indent=2) if args.json else render(found))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
