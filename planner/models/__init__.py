"""Models: from a config to weights, cache and operators per device."""

from planner.models.catalog import config_at, load_model, model_rows
from planner.models.huggingface import families, from_config
from planner.models.operators import attention_cap_tokens, layer_graph, step_terms
from planner.models.parameters import Parameters, count_parameters
from planner.models.sharding import (
    Degrees,
    KvFootprint,
    check_degrees,
    kv_bytes_per_token,
    shard_weights,
    stage_layers,
)
from planner.models.spec import (
    AttentionSpec,
    FfnSpec,
    LayerGroup,
    ModelSpec,
    QuantizationDefault,
)

__all__ = [
    "AttentionSpec",
    "Degrees",
    "FfnSpec",
    "KvFootprint",
    "LayerGroup",
    "ModelSpec",
    "Parameters",
    "QuantizationDefault",
    "attention_cap_tokens",
    "check_degrees",
    "config_at",
    "count_parameters",
    "families",
    "from_config",
    "kv_bytes_per_token",
    "layer_graph",
    "load_model",
    "model_rows",
    "shard_weights",
    "stage_layers",
    "step_terms",
]
