"""Weights on disk: public checkpoints, which are read strictly, and the exports of this package.

An export is a folder of `model.safetensors` and `config.json`, which contains the kind of network and its geometry.
"""

import errno
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixar import __version__
from mixar.errors import UserError
from mixar.files import creating_folder, write_json

State = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_CODEC = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_SHOWN = 5  # names listed per kind of fault; a wrong file has hundreds


@dataclass(frozen=True)
class Published:
    """The differences of a public checkpoint from the module's own state dict."""

    nesting: tuple[str, ...] = ()  # keys that may contain the state dict, the preferred one first
    keep: tuple[str, ...] = ("",)  # prefixes of the keys to keep; the empty one keeps all
    rename: dict[str, str] = field(default_factory=dict)  # old prefix -> new prefix


PUBLIC = {
    "mar": Published(nesting=("model_ema", "model")),
    "generator": Published(rename={"token_emb": "input_proj"}),  # an older name
    "tokenizer": Published(),
    # VA-VAE is under state_dict or flat, KL-16 under model; both may include a discriminator and DINOv2
    "vae": Published(nesting=("state_dict", "model"), keep=_CODEC),
}


def read_state(path: str | Path, nesting: tuple[str, ...] = (), trust_pickle: bool = False) -> State:
    """The state dict of a .safetensors file or of a torch pickle, on the CPU.

    Args:
        path: the file.
        nesting: keys that may contain the state dict, the preferred one first; without any of them it is flat.
        trust_pickle: run the code in a pickle of arbitrary objects; unsafe for a file of unknown origin.

    Raises:
        UserError: the file is missing, a folder, of an unknown type, broken, a pickle that needs trust, or has no
            weights.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder without the config.json and model.safetensors of an export: "
            "name an export folder or a checkpoint file"
        )
    if not path.is_file():
        raise UserError(f"no weights at {path}: name an export folder or a checkpoint file")
    content: Any
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in PICKLES:
        content = _read_pickle(path, trust_pickle)
    else:
        raise UserError(f"{path} is not a known type of weights: expected .safetensors, {', '.join(PICKLES)}")

    state: Any = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in nesting if isinstance(content.get(key), Mapping)), content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = _some([str(key) for key in state]) if isinstance(state, Mapping) else type(state).__name__
        places = " or ".join([f"under '{key}'" for key in nesting] + ["at the top"])
        raise UserError(f"{path} has no state dict {places}; found: {found}")
    return dict(state)


def read_public(path: str | Path, kind: str, trust_pickle: bool = False) -> State:
    """The state dict of a public checkpoint of `kind` (a key of `PUBLIC`), under the module's own names.

    Raises:
        UserError: as in `read_state`.
    """
    published = PUBLIC[kind]
    state = read_state(path, published.nesting, trust_pickle)
    state = {name: value for name, value in state.items() if name.startswith(published.keep)}
    for old, new in published.rename.items():
        state = {new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in state.items()}
    return state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`, key for key, in the module's dtypes; a module on the meta device shares its memory.

    Raises:
        UserError: keys are missing, extra or misshapen; one message lists them all and names `source`.
    """
    own = module.state_dict()
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "misshapen": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        listing = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise UserError(
            f"{source} does not fit the configured {type(module).__name__}: {listing}. "
            "Name the weights of this network, or write their geometry in the config"
        )
    state = {name: state[name].to(own[name].dtype) for name in own}
    module.load_state_dict(state, assign=any(value.is_meta for value in own.values()))


def loaded(build: Callable[[], Network], state: Mapping[str, Tensor], source: str | Path) -> Network:
    """The network of `build` with the weights `state`, without initialising it. Raises UserError as `load_strict`."""
    with torch.device("meta"):
        network = build()
    load_strict(network, state, source)
    return network


def read_fitting(
    path: str | Path, own: Mapping[str, Tensor], tell: Callable[[str], None], trust_pickle: bool = False
) -> State:
    """Weights of another network to start from: those with the same name and shape as in `own`.

    Args:
        path: an export folder, a run directory with exports, or a checkpoint file, flat or nested like MAR's.
        own: the state dict of the network to start; only its shapes are used.
        tell: is called with a line about the loaded, new, misshapen and unused weights.
        trust_pickle: as in `read_state`.

    Raises:
        UserError: as in `read_state`, or if not a single tensor fits.
    """
    if Path(path).is_dir():
        folder = find_export(path)
        state = _read_weights(folder, describe_export(folder))
    else:
        state = read_state(path, PUBLIC["mar"].nesting, trust_pickle)
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise UserError(f"no tensor in {path} has a name and shape of this network: write init_from=<similar weights>")
    report = {
        "loaded": list(fitting),
        "new": [name for name in own if name not in state],
        "of another shape, so new": [name for name in own if name in state and name not in fitting],
        "not used": [name for name in state if name not in own],
    }
    tell(
        f"init_from {path}: "
        + "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in report.items() if names)
    )
    return fitting


def write_export(
    folder: str | Path, kind: str, config: dict[str, Any], state: Mapping[str, Tensor], replace: bool = False,
    **extra: Any,
) -> None:  # fmt: skip
    """Write the export `folder`: it appears complete or not at all.

    Args:
        folder: to be created, with its parents.
        kind: the kind of network, such as vae, tokenizer, prior, mixar.
        config: the network's section(s) of the config, as plain values.
        state: its state dict, with all values on this rank.
        replace: replace an existing folder.
        extra: further entries of config.json.

    Raises:
        UserError: `folder` exists or cannot be written, or weights are not finite.
    """
    with creating_folder(folder, replace) as aside:
        write_network(aside, kind, config, state, **extra)


def write_network(folder: Path, kind: str, config: dict[str, Any], state: Mapping[str, Tensor], **extra: Any) -> str:
    """Write the files of an export to the temporary `folder`; arguments and errors as in `write_export`.

    Returns:
        The fingerprint of the weights.
    """
    if name := not_finite_in(state):
        raise UserError(f"the {kind} has weights that are not finite, such as {name}: take an earlier checkpoint")
    folder.mkdir(exist_ok=True)
    try:
        weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(weights, folder / "model.safetensors")
    except SafetensorError as error:  # raised for a full disk
        raise OSError(errno.EIO, str(error)) from None
    known = fingerprint(state)
    about = {"kind": kind, "version": __version__, "fingerprint": known, "config": config}
    write_json(folder / "config.json", about | extra)
    return known


def not_finite_in(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first of these weights with a value that is not finite."""
    # a sum is read from memory once, and is finite only of finite values
    suspects = (item for item in state.items() if not item[1].sum().isfinite())
    return next((name for name, value in suspects if not value.isfinite().all()), None)


def is_export(path: str | Path) -> bool:
    """Whether `path` is a folder with the two files of an export."""
    return all((Path(path) / name).is_file() for name in ("config.json", "model.safetensors"))


def find_export(path: str | Path) -> Path:
    """`path` itself if it is an export, else the newest in `path`/exports, where training writes them.

    Raises:
        UserError: neither exists.
    """
    path = Path(path)
    if is_export(path):
        return path
    found = newest_export(path)
    if found is None:
        raise UserError(
            f"no export at {path}: give a folder with config.json and model.safetensors, or a run directory; "
            f"`mixar export {path}` makes one of a run's newest checkpoint"
        )
    return found


def export_path(run: Path, images: int) -> Path:
    """The path of the export of the EMA weights after `images` images in the run directory `run`."""
    return run / "exports" / f"{images}-ema"


def newest_export(run: Path) -> Path | None:
    """The export in the run directory `run` after the most images; None if there is none."""
    found = [file.parent for file in run.glob("exports/[0-9]*-ema/config.json")]
    return max(found, key=lambda folder: int(folder.name.removesuffix("-ema")), default=None)


def holds(folder: str | Path, state: Mapping[str, Tensor]) -> bool:
    """Whether the export `folder` is complete and contains exactly these weights."""
    try:
        return fingerprint(_read_weights(Path(folder), describe_export(folder))) == fingerprint(state)
    except UserError:
        return False


def describe_export(folder: str | Path) -> dict[str, Any]:
    """The contents of config.json in the export `folder`.

    Raises:
        UserError: it was not written by `write_export`.
    """
    try:
        description = json.loads((Path(folder) / "config.json").read_text())
        description["kind"], description["config"]
        return description
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder}/config.json is not what `mixar export` writes: export the network again") from None


def read_export(folder: str | Path, kind: str) -> tuple[dict[str, Any], State]:
    """The config.json and the state dict of the export `folder`.

    Raises:
        UserError: the export is missing, broken or of another kind, or its weights were changed.
    """
    folder = Path(folder)
    if not is_export(folder):
        raise UserError(f"{folder} is not an export: expected a folder with config.json and model.safetensors")
    description = describe_export(folder)
    if description["kind"] != kind:
        raise UserError(f"{folder} holds weights of kind '{description['kind']}', expected '{kind}'")
    return description, _read_weights(folder, description)


def _read_weights(folder: Path, description: Mapping[str, Any]) -> State:
    """The state dict of the export `folder`. Raises UserError if its config.json belongs to other weights."""
    state = read_state(folder / "model.safetensors")
    known = description.get("fingerprint")  # missing in the oldest exports
    if known is not None and known != (found := fingerprint(state)):
        raise UserError(
            f"{folder}/model.safetensors holds other weights than its config.json was written with (fingerprint "
            f"{found} instead of {known}): it is damaged or of another folder; export again, or copy complete folders"
        )
    return state


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hex digits that identify weights: SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)  # flat, since a scalar cannot be viewed as bytes
    return digest.hexdigest()[:16]


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is broken or not a safetensors file ({error}): fetch or export it again") from None


def _read_pickle(path: Path, trust_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # a pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and not trust_pickle:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{path} holds more than tensors{f' ({found[1]})' if found else ''}, and reading that runs "
                "code from the file: pass --trust-pickle if you trust its source"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {reason}): fetch it again") from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
