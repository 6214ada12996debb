"""Estimate what a recipe needs before it runs: memory of each GPU, FLOP, hours and the size of a teacher cache."""

from importlib import import_module

_HOME = {
    "ModelStats": "model_stats",
    "Workload": "workload",
    "MemoryBreakdown": "memory",
    "Plan": "planner",
    "Strategy": "strategy",
    "estimate_memory": "memory",
    "model_config": "shapes",
    "plan": "planner",
    "rule_of_thumb": "flops",
}

__all__ = [
    "MemoryBreakdown",
    "ModelStats",
    "Plan",
    "Strategy",
    "Workload",
    "estimate_memory",
    "model_config",
    "plan",
    "rule_of_thumb",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.planning' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
