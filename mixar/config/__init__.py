"""Every knob once; defaults < yaml < `key=value`, checked."""

from mixar.config.knobs import (
    GUIDANCES,
    PRECISIONS,
    TASKS,
    Config,
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PriorConfig,
    SampleConfig,
    TIMixConfig,
    TokenizerConfig,
    TrainConfig,
    VAEConfig,
)
from mixar.config.loading import load_config, section_from_dict, to_dict, to_yaml, validate

__all__ = [
    "GUIDANCES",
    "PRECISIONS",
    "TASKS",
    "Config",
    "DataConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "PriorConfig",
    "SampleConfig",
    "TIMixConfig",
    "TokenizerConfig",
    "TrainConfig",
    "VAEConfig",
    "load_config",
    "section_from_dict",
    "to_dict",
    "to_yaml",
    "validate",
]
