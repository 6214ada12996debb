"""Estimate what a recipe needs before it runs: memory of each GPU, FLOP, hours and the size of a teacher cache."""

from importlib import import_module
from typing import TYPE_CHECKING

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

__all__ = list(_HOME)

if TYPE_CHECKING:
    from .flops import rule_of_thumb as rule_of_thumb
    from .memory import MemoryBreakdown as MemoryBreakdown
    from .memory import estimate_memory as estimate_memory
    from .model_stats import ModelStats as ModelStats
    from .planner import Plan as Plan
    from .planner import plan as plan
    from .shapes import model_config as model_config
    from .strategy import Strategy as Strategy
    from .workload import Workload as Workload
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
