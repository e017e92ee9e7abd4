"""A prior from a golden fixture's configuration and state dict."""

from typing import Any

from fixtures import Fixture

from mixar.config import PriorConfig
from mixar.prior import Prior


def prior_from(fixture: Fixture, geometry: dict[str, Any]) -> Prior:
    """The prior in eval mode, its state dict loaded strictly; `geometry` has the reference's names."""
    prior = Prior(
        PriorConfig(
            width=geometry["hidden_dim"],
            depth=geometry["depth"],
            heads=geometry["heads"],
            mlp_width=geometry["mlp_dim"],
            dropout=geometry["dropout"],
            prenorm=geometry["use_prenorm"],
            bits=geometry["codebook_size"].bit_length() - 1,
            splits=geometry["codebook_splits"],
            grid=geometry["img_size"] // geometry["input_stride"],
            classes=geometry["nclass"],
        )
    )
    prior.load_state_dict(fixture.under("sd."), strict=True)
    return prior.eval()
