"""Checks of this machine: versions, devices, memory, compilers; with a config also folders, shards and weights.

With --gpu the checks of `mixar.gpu` in their place.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as c10d
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mixar import __version__, dist
from mixar.codecs import load_tokenizer, load_vae
from mixar.config import Config, load_config, missing_inputs, needed_inputs, to_dict
from mixar.data.manifest import check_manifest, read_manifest
from mixar.data.remote import MANIFEST
from mixar.errors import UserError
from mixar.files import check_writable, try_writing, write_json
from mixar.ops.build import DEVICES, status
from mixar.prior import load_prior

EXTRAS = ("train", "plot", "demo")  # those of pyproject.toml that users install
GPU_FILE = "gpu.json"  # in the current folder


class Finding(NamedTuple):
    """The result of a check; `status` is ok, note or bad."""

    status: str
    text: str


def examine(cfg: Config | None) -> Iterator[Finding]:
    """All checks; those of folders, shards and weights only with a config."""
    yield Finding("ok", f"mixar {__version__}, python {platform.python_version()}")
    yield from versions()
    yield accelerator("flash_attn", "flash_attn_func", "attention runs in torch's own kernels")
    # PyPI's apex is a web toolkit; NVIDIA's is built from source
    yield accelerator("apex.optimizers", "FusedAdam", "AdamW runs in torch's own fused kernel")
    yield from devices(cfg)
    yield shared_memory()
    yield from compilers()
    yield from operators(dist.find().device.type)
    if cfg is not None:
        yield writable("run_dir", cfg.run_dir)
        if cfg.task in ("prior", "mixar"):
            yield shards(cfg)
        if cfg.data.cache is not None:
            yield writable("data.cache", cfg.data.cache)
        yield from weights(cfg)
        others = [key for key in needed_inputs(cfg) if not key.endswith(".weights")]
        yield from (Finding("bad", text) for text in missing_inputs(cfg, others))


def odd_ones(found: list[tuple[str, list[Finding]]]) -> Iterator[Finding]:
    """Findings of a node that most ranks do not have, with the node's name.

    Args:
        found: the host name and findings of each rank.
    """

    def plain(finding: Finding) -> Finding:  # free space differs everywhere
        return finding._replace(text=re.sub(r"[\d.]+ GiB free", "space", finding.text))

    usual = Counter(plain(finding) for _, findings in found for finding in set(findings))
    odd = {(host, f) for host, findings in found for f in findings if usual[plain(f)] <= len(found) / 2}
    for host, finding in sorted(odd):
        yield Finding(finding.status, f"{host} differs from most: {finding.text}")


def all_reduce(place: dist.Place, megabytes: int = 64, rounds: int = 5) -> Finding:
    """A timed sum over all ranks, like that of gradients; a collective."""
    values = torch.ones(megabytes * 2**18, device=place.device)
    seconds = []
    for _ in range(rounds + 1):  # the first round connects
        begun = time.perf_counter()
        c10d.all_reduce(values)
        total = values[0].item()  # waits for the sum
        seconds.append(time.perf_counter() - begun)
        values.fill_(1)
    if total != place.world:
        return Finding("bad", f"an all-reduce over {place.world} ranks gave {total:g}: the interconnect is broken")
    best = min(seconds[1:])
    rate = 2 * (place.world - 1) / place.world * megabytes / 1024 / best
    return Finding("ok", f"all-reduce of {megabytes} MiB over {place.world} ranks on {place.nodes} nodes: "
                         f"{1000 * best:.1f} ms, {rate:.2f} GiB/s through each rank's link")  # fmt: skip


def versions() -> Iterator[Finding]:
    """The packages of mixar and of its extras, against the ranges that mixar and they require of each other."""
    try:
        own = {r.name: r for r in _requirements("mixar")}
        extra = {r.name: name for name in EXTRAS for r in _requirements("mixar", name) if r.name not in {*own, "mixar"}}
    except metadata.PackageNotFoundError:
        yield Finding("note", "mixar is not installed, so versions are not checked: write pip install -e .")
        return
    own |= {r.name: r for name in EXTRAS for r in _requirements("mixar", name) if r.name in extra}
    versions_found = {name: _version(name) for name in own}
    asked = [("mixar", requirement) for requirement in own.values()]
    asked += [(name, r) for name, version in versions_found.items() if version is not None for r in _requirements(name)]
    for name, version in versions_found.items():
        if version is None and name in extra:
            yield Finding("note", f"{name} is missing, for {extra[name]}: write pip install 'mixar[{extra[name]}]'")
            continue
        wanted = [(asker, r) for asker, r in asked if canonicalize_name(r.name) == canonicalize_name(name)]
        refused = [(asker, r) for asker, r in wanted if version is None or not r.specifier.contains(version, True)]
        if refused:
            needs = ", ".join(f"{asker} needs {r.name}{r.specifier}" for asker, r in refused)
            ranges = ",".join(sorted({str(r.specifier) for _, r in refused if r.specifier}))
            found = f"{name} {version}" if version else f"{name} is missing"
            yield Finding("bad", f"{found}: {needs}; write pip install '{name}{ranges}'")
        else:
            yield Finding("ok", f"{name} {version}")


def accelerator(module: str, name: str, without: str) -> Finding:
    """An optional package, which must be importable and hold the function `name`."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return Finding("note", f"{package} (optional) is not installed: {without}")
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:  # builds for another torch or card fail in many ways
        reason = " ".join(str(error).split())
        return Finding("note", f"{package} (optional) is broken or another package of that name ({reason}): {without}")
    return Finding("ok", f"{package} with {name}")


def devices(cfg: Config | None) -> Iterator[Finding]:
    """GPUs, bf16, threads."""
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    device = dist.find().device
    if device.type == "cpu":
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        yield Finding("note", f"torch, built for {build}, sees no GPU: everything runs on the CPU")
    if dist.fast_precision(device) == "bf16":
        yield Finding("ok", f"bf16 is native on this {device.type}")
    elif cfg is not None and cfg.train.precision == "fp32":
        yield Finding("ok", f"fp32, since bf16 is not native on this {device.type}")
    else:
        yield Finding("note", f"bf16 is not native on this {device.type} and slow: write train.precision=fp32")
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if threads > cores:
        yield Finding("note", f"{threads} threads on {cores} cores: write OMP_NUM_THREADS={cores} before the command")
    else:
        yield Finding("ok", f"{threads} threads on {cores} cores")


def shared_memory() -> Finding:
    """/dev/shm, through which loader processes pass their batches."""
    try:
        free = shutil.disk_usage("/dev/shm").free / 2**30
    except OSError:
        return Finding("note", "no /dev/shm: write data.workers=0")
    if free < 1:
        return Finding("note", f"/dev/shm has {free:.2f} GiB free, little for loaders: write data.workers=0, or start "
                               "the container with --shm-size=8g")  # fmt: skip
    return Finding("ok", f"/dev/shm has {free:.0f} GiB free")


def compilers() -> Iterator[Finding]:
    """The compilers that build the custom operators."""
    for name in ("g++", "nvcc"):
        if path := shutil.which(name):
            yield Finding("ok", f"{name} at {path}")
        else:
            yield Finding("note", f"no {name}: operators run in plain PyTorch")


def operators(device: str) -> Iterator[Finding]:
    """The implementation of the custom operators that a run on `device` uses, and what else has been compiled."""
    compiled, text = status(device)
    yield Finding("ok" if compiled else "note", f"a run here takes {text}")
    for other in DEVICES:
        if other != device and (found := status(other))[0]:
            yield Finding("ok", found[1])


def writable(key: str, folder: str) -> Finding:
    """Whether `folder` can be created and written, tried with a file in its nearest existing parent."""
    try:
        free = shutil.disk_usage(try_writing(folder)).free / 2**30
    except OSError as error:
        return Finding("bad", f"{key}={folder} cannot be written ({error.strerror}): write {key}=<a folder you own>")
    return Finding("ok", f"{key}={folder} can be written, {free:.0f} GiB free")


def shards(cfg: Config) -> Finding:
    """Whether finished shards fit the config; where there are none, whether they can be made."""
    where = cfg.data.shards
    if ":/" not in where and not Path(where, MANIFEST).is_file():
        folder = writable("data.shards", where)
        return folder if folder.status == "bad" else Finding("note", f"{folder.text}, and needs mixar prepare")
    try:
        manifest = read_manifest(where, cfg.data.cache)
        check_manifest(manifest, cfg)
    except UserError as error:
        return Finding("bad", str(error))
    return Finding("ok", f"shards in {where} fit the config: {manifest.count} images, {len(manifest.classes)} classes")


def weights(cfg: Config) -> Iterator[Finding]:
    """Whether the frozen networks that the config names can be loaded; each is loaded."""
    loaders: dict[str, Callable[[], object]] = {
        "vae": lambda: load_vae(cfg.vae, cfg.trust_pickle),
        "tokenizer": lambda: load_tokenizer(cfg.tokenizer, cfg.trust_pickle),
        "prior": lambda: load_prior(cfg.prior, cfg.trust_pickle),
    }
    for kind, load in loaders.items():
        path = getattr(cfg, kind).weights
        if path is None:
            continue
        try:
            load()
        except UserError as error:
            yield Finding("bad", f"{kind}.weights={path}: {error}")
        else:
            yield Finding("ok", f"{kind}.weights={path} can be loaded")


def run(args: argparse.Namespace) -> None:
    files = [text for text in args.given if "=" not in text]
    if len(files) > 1:
        raise UserError(f"several configs were given ({', '.join(files)}): write one")
    overrides = [text for text in args.given if "=" in text]
    cfg = load_config(files[0] if files else None, overrides) if args.given else None
    if args.gpu:
        check_gpu(cfg if files else None)
        return
    place = dist.start(timeout=120)
    try:
        findings = []
        for finding in examine(cfg):
            findings.append(finding)
            if place.is_main:
                _print(finding)
        if place.world > 1:
            together = [*odd_ones(dist.gather(place, (socket.gethostname(), findings))), all_reduce(place)]
            for finding in together if place.is_main else []:
                _print(finding)
            findings = findings + together if place.is_main else []
    finally:
        dist.leave()
    bad = sum(finding.status == "bad" for finding in findings)
    if bad:
        raise UserError(f"{bad} of {len(findings)} checks are bad: fix what the lines starting with `bad` report")


def check_gpu(cfg: Config | None) -> None:
    """Run the checks of a GPU, print their table, and write gpu.json after each finding.

    Raises:
        UserError: no config of MixAR, no GPU, or several ranks; or a check is bad.
    """
    place = dist.find()
    if cfg is None or cfg.task != "mixar":
        given = "no config" if cfg is None else f"a config with task={cfg.task}"
        raise UserError(f"--gpu checks a training of MixAR, and {given} was given: write mixar doctor mixar_l --gpu")
    if place.device.type != "cuda":
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        raise UserError(
            f"--gpu needs a GPU, and torch, built for {build}, sees none: start it on a machine with one, with a torch "
            "built for CUDA, and look at CUDA_VISIBLE_DEVICES; without --gpu the doctor checks this machine"
        )
    if place.world > 1:
        raise UserError(f"--gpu starts its own ranks, and {place.world} were started: write mixar doctor CONFIG --gpu")
    check_writable(Path(GPU_FILE))
    from mixar import gpu  # imports everything that trains and samples, which takes seconds

    about, findings = gpu.describe() | {"config": to_dict(cfg)}, []
    for finding in gpu.examine(cfg, place.device):
        findings.append(finding)
        print(gpu.row(finding), flush=True)
        write_json(GPU_FILE, about | {"findings": [dataclasses.asdict(finding) for finding in findings]})
    print(f"\nall figures are in {GPU_FILE}")
    bad = sum(finding.status == "bad" for finding in findings)
    if bad:
        raise UserError(
            f"{bad} of {len(findings)} checks are bad: report the lines starting with `bad`, and {GPU_FILE}"
        )


def _print(finding: Finding) -> None:
    print(f"{finding.status:<4}  {finding.text}", flush=True)


def _requirements(name: str, extra: str = "") -> list[Requirement]:
    """The requirements of an installed package on this machine, by itself or with one of its extras."""
    parsed = [Requirement(text) for text in metadata.requires(name) or []]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": extra})]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
