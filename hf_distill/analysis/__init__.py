"""Analysis of recipes and runs: the teacher's soft labels, the student's agreement and retention, failure modes."""

from importlib import import_module

_HOME = {
    "ModelPair": "analysis.model_pair",
    "Run": "runner.run_results",
    "compute": "analysis.curve",
    "data_curve": "analysis.curve",
    "diagnose": "analysis.diagnosis",
    "find_shape": "analysis.shape_search",
    "find_temperature": "analysis.temperature_search",
    "inspect_teacher": "analysis.inspector",
    "load_tasks": "analysis.lm_eval_tasks",
    "measure_drafts": "analysis.draft",
    "measure_drafts_of": "analysis.draft",
    "open_run": "runner.run_results",
    "plan": "planning.planner",
    "retention": "analysis.evaluation",
    "retention_of": "analysis.evaluation",
}

__all__ = [
    "ModelPair",
    "Run",
    "compute",
    "data_curve",
    "diagnose",
    "find_shape",
    "find_temperature",
    "inspect_teacher",
    "load_tasks",
    "measure_drafts",
    "measure_drafts_of",
    "open_run",
    "plan",
    "retention",
    "retention_of",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.analysis' has no attribute {name!r}")
    return getattr(import_module(f"hf_distill.{_HOME[name]}"), name)
