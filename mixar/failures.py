"""Errors of the device, its driver and the host's memory, as sentences for a user."""

import errno
from collections.abc import Callable
from pathlib import Path

import torch

from mixar.errors import UserError
from mixar.log import log

# texts of torch's errors: the classes are only RuntimeError and torch.AcceleratorError
_GPU_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory")
# deepspeed names the cards anew for the ranks that it starts, and so does Slurm in jobs that have cards
ON_CPU = (
    "CUDA_VISIBLE_DEVICES= before the command runs on the CPU, with torchrun in place of deepspeed, and under Slurm as "
    "srun env CUDA_VISIBLE_DEVICES= python"
)
_DRIVER = f"update the driver, or install a torch built for an older CUDA; {ON_CPU}"
_REFUSED = {
    "no kernel image is available": "this torch has no code for this GPU, only for {architectures}: install a torch "
    f"built for it; {ON_CPU}",
    "driver version is insufficient": f"the NVIDIA driver is older than this torch's CUDA {{cuda}}: {_DRIVER}",
    "driver on your system is too old": f"the NVIDIA driver is older than this torch's CUDA {{cuda}}: {_DRIVER}",
    "busy or unavailable": "another process has this GPU for itself, `nvidia-smi` lists it: end it, or name another "
    "card as CUDA_VISIBLE_DEVICES=<number>, to deepspeed as --include localhost:<number>",
}
_LATE = "CUDA reports it late: with CUDA_LAUNCH_BLOCKING=1 before the command, the traceback shows the operation"
_EXPLAINED = {
    "device-side assert": f"Most often an index is out of range, such as a label beyond data.classes. {_LATE}",
    "illegal memory access": f"A kernel is wrong, or the card is faulty: see whether another one has it too. {_LATE}",
    "ECC error": "The card's memory is faulty: `nvidia-smi -q` describes it; leave its node out",
}
_FREE = f"`nvidia-smi` lists what else holds its memory; {ON_CPU}"


def in_words(error: BaseException, remedy: Callable[[bool], str] | None = None) -> BaseException:
    """`error`, or in its place a UserError where a user can act on it; some others get a note for their traceback.

    Args:
        remedy: what to write for less memory, of the GPU or of the host; by default what helps with any command.
    """
    text = " ".join(str(error).split())
    host = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if host or (isinstance(error, RuntimeError) and any(part in text for part in _HOST_MEMORY)):
        other = remedy(False) if remedy else ""
        fix = "give the job more of it" + f", or {other}" * bool(other)
        return UserError(f"this machine is out of memory ({text or type(error).__name__}): {fix}")
    if is_out_of_gpu_memory(error):
        what = text.partition(" If reserved but unallocated")[0].rstrip(".")  # torch's advice on its allocator follows
        return UserError(f"the GPU is out of memory ({what}): {remedy(True) if remedy else _FREE}")
    if isinstance(error, RuntimeError) and "CUDA" in text:
        for part, sentence in _REFUSED.items():
            if part in text:
                architectures = ", ".join(torch.cuda.get_arch_list())
                return UserError(sentence.format(architectures=architectures, cuda=torch.version.cuda))
        for part, sentence in _EXPLAINED.items():
            if part in text:
                error.add_note(sentence)
    return error


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether an allocation on a GPU failed, in torch or in a library that it calls."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _GPU_MEMORY)


def keep_memory_snapshot(file: Path) -> None:
    """Write what torch holds on the GPU, to be opened at https://pytorch.org/memory_viz; no history is recorded."""
    try:
        torch.cuda.memory._dump_snapshot(str(file))
    except (OSError, RuntimeError) as error:
        log.warning("%s, with what is on the GPU, cannot be written (%s)", file, error)
    else:
        log.warning("%s shows what is on the GPU: open it at https://pytorch.org/memory_viz", file)
