"""Estimate what a recipe needs before it runs: memory of each GPU, FLOP, hours and the size of a teacher cache."""

from typing import TYPE_CHECKING

from ..lazy_imports import import_on_first_use

_HOME = {
    "ModelStats": ".model_stats",
    "Workload": ".workload",
    "MemoryBreakdown": ".memory",
    "Plan": ".planner",
    "Strategy": ".strategy",
    "estimate_memory": ".memory",
    "model_config": ".shapes",
    "plan": ".planner",
    "rule_of_thumb": ".flops",
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
    __getattr__ = import_on_first_use(__name__, _HOME)
