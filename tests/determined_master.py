"""Fills in an experiment config as a Determined 0.38.1 master does before a trial reads it."""

from copy import deepcopy
from typing import Any

# The schema's defaults. tests/test_submission.py holds it against the schema's files,
# tests/cluster against what a master answers.
DEFAULTS = {
    "bind_mounts": [],
    "checkpoint_policy": "best",
    "checkpoint_storage": None,
    "data": {},
    "debug": False,
    "description": None,
    "entrypoint": None,
    "environment": {
        "add_capabilities": [],
        "drop_capabilities": [],
        "environment_variables": [],
        "force_pull_image": False,
        "image": {},
        "pod_spec": None,
        "ports": {},
        "proxy_ports": [],
        "registry_auth": None,
    },
    "hyperparameters": {},
    "integrations": None,
    "labels": [],
    "log_policies": [],
    "max_restarts": 5,
    "min_checkpoint_period": {"batches": 0},
    "min_validation_period": {"batches": 0},
    "name": None,
    "optimizations": {
        "aggregation_frequency": 1,
        "auto_tune_tensor_fusion": False,
        "average_aggregated_gradients": True,
        "average_training_metrics": True,
        "grad_updates_size_file": None,
        "gradient_compression": False,
        "mixed_precision": "O0",
        "tensor_fusion_cycle_time": 1,
        "tensor_fusion_threshold": 64,
    },
    "pbs": {},
    "perform_initial_validation": False,
    "preemption_timeout": None,
    "profiling": {"begin_on_batch": 0, "enabled": False, "end_after_batch": None, "sync_timings": True},
    "project": "",
    "records_per_epoch": 0,
    "reproducibility": {"experiment_seed": None},
    "resources": {
        "devices": [],
        "is_single_node": None,
        "max_slots": None,
        "native_parallel": False,
        "priority": None,
        "resource_pool": "",
        "shm_size": None,
        "slots_per_trial": 1,
        "weight": 1,
    },
    "scheduling_unit": 100,
    "searcher": {
        "metric": None,
        "smaller_is_better": True,
        "source_checkpoint_uuid": None,
        "source_trial_id": None,
    },
    "slurm": {},
    "workspace": "",
}
SEARCHER_DEFAULTS = {
    "single": {},
    "adaptive_asha": {
        "bracket_rungs": [],
        "divisor": 4,
        "max_concurrent_trials": 16,
        "max_rungs": 5,
        "max_time": None,
        "max_trials": None,
        "mode": "standard",
        "time_metric": None,
    },
}
# These come from the master's own code: policies of other names stay beside them.
LOG_POLICIES = [
    {"name": "CUDA OOM", "pattern": ".*CUDA out of memory.*"},
    {"name": "ECC Error", "pattern": ".*uncorrectable ECC error encountered.*"},
]
# Values of the cluster's administrator, and the seed, whose default is the time.
OF_THE_CLUSTER = ("bind_mounts", "checkpoint_storage", "environment.image", "environment.environment_variables")
OF_THE_CLUSTER += ("preemption_timeout", "resources.priority", "resources.resource_pool")


def handed_over(config: dict[str, Any]) -> dict[str, Any]:
    """An experiment config as a trial gets it, with all defaults except those in `OF_THE_CLUSTER`."""
    searcher = {**DEFAULTS["searcher"], **SEARCHER_DEFAULTS[config["searcher"]["name"]]}
    filled = _filled(deepcopy(config), deepcopy({**DEFAULTS, "searcher": searcher}))
    filled["hyperparameters"] = {name: _const(value) for name, value in filled["hyperparameters"].items()}
    names = {policy.get("name") for policy in filled["log_policies"]}
    filled["log_policies"] = filled["log_policies"] + [p for p in LOG_POLICIES if p["name"] not in names]
    return filled


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    for key, default in defaults.items():
        # a length keeps its unit
        if default and isinstance(default, dict) and isinstance(given.get(key), dict) and "batches" not in default:
            filled[key] = _filled(given[key], default)
    return filled


def _const(value: Any) -> Any:
    """A hyperparameter as the master writes it: plain values become constants at every depth."""
    if isinstance(value, dict):
        return value if "type" in value else {name: _const(item) for name, item in value.items()}
    return {"type": "const", "val": value}
