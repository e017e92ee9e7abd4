"""The house's plan: imports go down the floors, one third-party library has one room, no room hides another package."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import mixar

ROOT = Path(mixar.__file__).parent
FLOORS = (
    "cards environment errors signals transfer",
    "files log resources slurm",
    "failures",
    "ops",
    "config rng weights dist",
    "sampling_flags",
    "command_line",
    "codecs prior mixing",
    "data model",
    "engine sampling metrics",
    "checkpoint evaluation plan profiler watch",
    "objectives",
    "gpu tasks trainer",
    "train",
    "demo",
    "verbs",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
OWNER = {
    "deepspeed": "engine",
    "streaming": "data",
    "torch_fidelity": "evaluation",
    "tensorboard": "metrics",
    "omegaconf": "config",
}


def room(path: Path, root: Path) -> str:
    """The folder or file directly below `root` that `path` belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: write imports in full, from mixar. on"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_faults(root: Path) -> list[str]:
    """Imports between rooms of `root` that do not go down, and rooms that stand on no floor."""
    files = [path for path in sorted(root.rglob("*.py")) if path != root / "__init__.py"]
    faults = [f"{name} stands on no floor" for name in sorted({room(path, root) for path in files} - set(FLOOR))]
    for path in files:
        here = room(path, root)
        for name in imported(path):
            package, _, rest = name.partition(".")
            there = rest.split(".")[0]
            if package == "mixar" and there in FLOOR and there != here and FLOOR[there] >= FLOOR.get(here, 0):
                faults.append(f"{path.relative_to(root)} imports {name}")
    return faults


def owner_faults(root: Path) -> list[str]:
    """Imports of a library outside the one room that may know it."""
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in sorted(root.rglob("*.py"))
        for name in imported(path)
        for library in library_of(name)
        if OWNER[library] != room(path, root)
    ]


def library_of(name: str) -> list[str]:
    """The owned library that a dotted name belongs to; torch carries a door to TensorBoard."""
    parts = name.split(".")
    return [library for library in OWNER if parts[0] == library or parts[:3] == ["torch", "utils", library]]


def hidden(names: Iterable[str]) -> list[str]:
    """Names that would hide a module of the standard library or an installed package, were they first on sys.path."""
    # what the interpreter loads before it has a sys.path, such as codecs, cannot be hidden
    early = output("-IS", "-c", "import sys; print(*sys.modules)").split()
    return sorted(set(names) & (set(sys.stdlib_module_names) | set(packages_distributions())) - set(early))


def output(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_imports_go_down_the_floors() -> None:
    assert floor_faults(ROOT) == []


def test_one_library_has_one_room() -> None:
    assert owner_faults(ROOT) == []


def test_no_room_hides_another_package() -> None:
    # `deepspeed mixar/train.py` puts the folder mixar/ first on sys.path
    rooms = {room(path, ROOT) for path in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert "train" in rooms and hidden(rooms) == []


def test_sampling_needs_no_training_library() -> None:
    libraries = ["deepspeed", "streaming", "torch_fidelity", "tensorboard", "matplotlib"]
    code = f"import mixar.sampling.sample_set, sys; print([name for name in {libraries} if name in sys.modules])"
    assert output("-c", code).strip() == "[]"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model/net.py", "from mixar.trainer import Trainer"),  # up
        ("codecs/vae.py", "from mixar import prior"),  # across
        ("rng.py", "def f():\n    import mixar.data.loader"),  # up, inside a function
        ("attic.py", ""),  # on no floor
    ],
)
def test_floors_see_a_fault(tmp_path: Path, file: str, text: str) -> None:
    good = {"model/mixar.py": "import mixar.model.net\nfrom mixar.config import Config", "__init__.py": ""}
    assert floor_faults(write(tmp_path, good)) == []
    assert len(floor_faults(write(tmp_path, {file: text}))) == 1


def test_libraries_see_a_fault(tmp_path: Path) -> None:
    good = {"data/loader.py": "import streaming.base", "model/net.py": "import torch.utils.data"}
    assert owner_faults(write(tmp_path, good)) == []
    bad = {"model/net.py": "def f():\n    from torch.utils.tensorboard import X", "x.py": "import deepspeed"}
    assert len(owner_faults(write(tmp_path, bad))) == 2


def test_hiding_is_seen() -> None:
    assert hidden(["model", "logging", "streaming", "torchvision"]) == ["logging", "streaming", "torchvision"]
