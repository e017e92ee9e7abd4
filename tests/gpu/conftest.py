import pytest
import torch

from mixar.config import Config, load_config

SMALL = [
    "model.encoder_width=32", "model.encoder_depth=1", "model.encoder_heads=2", "model.head_depth=1",
    "model.head_width=32", "model.dropout=0.1", "prior.width=32", "prior.depth=1", "prior.heads=2",
    "prior.mlp_width=64", "tokenizer.bits=8", "train.precision=fp32", "train.batch=16", "engine.timeout=60",
]  # fmt: skip


@pytest.fixture
def cfg() -> Config:
    """The demo's MixAR made small, with MAR's dropout; its weights do not exist."""
    return load_config("demo/mixar", SMALL)


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
