"""Analysis of recipes and runs: the teacher's soft labels, the student's agreement and retention, failure modes."""

from importlib import import_module
from typing import TYPE_CHECKING

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

__all__ = list(_HOME)

if TYPE_CHECKING:
    from ..planning.planner import plan as plan
    from ..runner.run_results import Run as Run
    from ..runner.run_results import open_run as open_run
    from .curve import compute as compute
    from .curve import data_curve as data_curve
    from .diagnosis import diagnose as diagnose
    from .draft import measure_drafts as measure_drafts
    from .draft import measure_drafts_of as measure_drafts_of
    from .evaluation import retention as retention
    from .evaluation import retention_of as retention_of
    from .inspector import inspect_teacher as inspect_teacher
    from .lm_eval_tasks import load_tasks as load_tasks
    from .model_pair import ModelPair as ModelPair
    from .shape_search import find_shape as find_shape
    from .temperature_search import find_temperature as find_temperature
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"hf_distill.{_HOME[name]}"), name)
