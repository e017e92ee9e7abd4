"""The config: every key is defined once, and set by defaults < yaml < `key=value`, then checked."""

from mixar.config.checks import check_sample, check_sample_values, profiled_steps
from mixar.config.inputs import check_inputs, missing_inputs
from mixar.config.knobs import (
    ATTENTIONS,
    ENGINES,
    GUIDANCES,
    MOST_CLASSES,
    ORDERS,
    PRECISIONS,
    PROCESSES,
    SOLVERS,
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
from mixar.config.loading import config_files, load_config, section_from_dict, to_dict, to_yaml, validate, value_of
from mixar.config.old import renamed
from mixar.config.passes import images_per_pass
from mixar.config.presets import PRESETS
from mixar.config.respacing import STEPS, even_times, respaced_steps

__all__ = [
    "ATTENTIONS",
    "ENGINES",
    "GUIDANCES",
    "MOST_CLASSES",
    "ORDERS",
    "PRECISIONS",
    "PRESETS",
    "PROCESSES",
    "SOLVERS",
    "STEPS",
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
    "check_inputs",
    "check_sample",
    "check_sample_values",
    "config_files",
    "even_times",
    "images_per_pass",
    "load_config",
    "missing_inputs",
    "profiled_steps",
    "renamed",
    "respaced_steps",
    "section_from_dict",
    "to_dict",
    "to_yaml",
    "validate",
    "value_of",
]
