"""Errors of GPUs, drivers and memory, as torch words them, end a command with a sentence."""

import errno
import traceback

import pytest
import torch

from mixar import failures
from mixar.__main__ import main
from mixar.errors import UserError
from mixar.verbs import prepare

NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ..."


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."), "allocate 2 MiB): `nvidia-smi"),
        (torch.AcceleratorError("CUDA error: out of memory"), "the GPU is out of memory (CUDA error: out of memory)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (MemoryError(), "this machine is out of memory (MemoryError): give the job more of it"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine is out of memory"),
        (torch.AcceleratorError(NO_KERNEL), "no code for this GPU, only for sm_75, sm_90: install a torch"),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), "driver is older than this"),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "another process has this GPU"),
    ],
)  # fmt: skip
def test_what_a_user_can_act_on_is_one_line(error, told, monkeypatch, capsys) -> None:
    def run(args):
        raise error

    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(prepare, "run", run)
    assert main(["prepare", "mixar_l"]) == UserError.status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mixar prepare: ") and told in line
    # which name the cards anew for their ranks
    assert "CUDA_VISIBLE_DEVICES=" not in line or ("deepspeed" in line and "srun" in line) or "--include" in line


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("CUDA error: device-side assert triggered", "a label beyond data.classes"),
        ("CUDA error: an illegal memory access was encountered", "with CUDA_LAUNCH_BLOCKING=1 before the command"),
        ("CUDA error: uncorrectable ECC error encountered", "leave its node out"),
    ],
)
def test_what_needs_its_traceback_keeps_it_with_a_note(text, note) -> None:
    error = torch.AcceleratorError(text)
    assert failures.in_words(error) is error
    assert note in "".join(traceback.format_exception(error))


def test_other_errors_stay_as_they_are() -> None:
    for error in (RuntimeError("a bug"), ValueError("out of memory"), OSError(errno.EIO, "x"), UserError("CUDA")):
        assert failures.in_words(error) is error and not hasattr(error, "__notes__")
