"""Specifications of GPUs by their makers: SXM form, dense FLOP/s, and a card's share of figures for a node."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU in a node of eight."""

    memory: float  # bytes; nominal GB as 10^9, which leaves 5-9 % of the memory for CUDA, NCCL and fragmentation
    bf16: float  # FLOP/s of the tensor cores
    fp32: float  # FLOP/s of the other cores, on which torch computes float32
    nvlink: float  # bytes/s in one direction
    network: float  # bytes/s in one direction, to other nodes


GPUS_A_NODE = 8

CARDS = {
    "h100": Card(memory=80e9, bf16=989e12, fp32=67e12, nvlink=450e9, network=50e9),
    "h200": Card(memory=141e9, bf16=989e12, fp32=67e12, nvlink=450e9, network=50e9),
    "a100": Card(memory=80e9, bf16=312e12, fp32=19.5e12, nvlink=300e9, network=25e9),
    "b200": Card(memory=180e9, bf16=2250e12, fp32=80e12, nvlink=900e9, network=50e9),
}


def find_card(device: str) -> Card | None:
    """The card that the driver names `device`, as in "NVIDIA H100 80GB HBM3"; None for one without figures here.

    Other forms of a card, and slices of it, have another peak.
    """
    words = re.split(r"[\s-]+", device.lower())
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((card for name, card in CARDS.items() if name in words), None)
