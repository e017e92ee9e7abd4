import shutil
import sys
from pathlib import Path

import pytest
import torch

from mixar.ops import load

sys.path.insert(0, str(Path(__file__).parent))  # `import kernels` from the tests beside it


@pytest.fixture(scope="session")
def native() -> None:
    """The compiled CPU operators, from the cache after the first time."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CPU operators with")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXAR_OPS", "native")
        load("cpu")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mixar::mix_gather", "CPU")
