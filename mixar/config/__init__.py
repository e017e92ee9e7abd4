"""Every knob once; defaults < yaml < `key=value`, checked."""

from mixar.config.checks import images_a_pass
from mixar.config.knobs import (
    ATTENTIONS,
    ENGINES,
    GUIDANCES,
    PRECISIONS,
    TASKS,
    Config,
    DataConfig,
    EngineConfig,
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
    "ATTENTIONS",
    "ENGINES",
    "GUIDANCES",
    "PRECISIONS",
    "TASKS",
    "Config",
    "DataConfig",
    "EngineConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "PriorConfig",
    "SampleConfig",
    "TIMixConfig",
    "TokenizerConfig",
    "TrainConfig",
    "VAEConfig",
    "images_a_pass",
    "load_config",
    "section_from_dict",
    "to_dict",
    "to_yaml",
    "validate",
]
