"""After a run: what the teacher says, what the student has learnt of it, and what went wrong."""

from importlib import import_module

_HOME = {
    "Pair": "analysis.pair",
    "Run": "analysis.folder",
    "compute": "analysis.curve",
    "data_curve": "analysis.curve",
    "diagnose": "analysis.diagnosis",
    "find_temperature": "analysis.temperature",
    "inspect_teacher": "analysis.inspector",
    "load_tasks": "analysis.harness",
    "open_run": "analysis.folder",
    "plan": "planning.planner",
    "report": "analysis.page",
    "retention": "analysis.per_task",
    "retention_of": "analysis.per_task",
    "write_samples": "analysis.samples",
}

__all__ = [
    "Pair",
    "Run",
    "compute",
    "data_curve",
    "diagnose",
    "find_temperature",
    "inspect_teacher",
    "load_tasks",
    "open_run",
    "plan",
    "report",
    "retention",
    "retention_of",
    "write_samples",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.analysis' has no attribute {name!r}")
    return getattr(import_module(f"hf_distill.{_HOME[name]}"), name)
