"""Analysis of recipes and runs: the teacher's soft labels, the student's agreement and retention, failure modes."""

from typing import TYPE_CHECKING

from ..lazy_imports import import_on_first_use

_HOME = {
    "ModelPair": ".model_pair",
    "Run": "..runner.run_results",
    "compute": ".curve",
    "data_curve": ".curve",
    "diagnose": ".diagnosis",
    "find_shape": ".shape_search",
    "find_temperature": ".temperature_search",
    "inspect_teacher": ".inspector",
    "load_tasks": ".lm_eval_tasks",
    "measure_drafts": ".draft",
    "measure_drafts_of": ".draft",
    "open_run": "..runner.run_results",
    "plan": "..planning.planner",
    "retention": ".evaluation",
    "retention_of": ".evaluation",
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
    __getattr__ = import_on_first_use(__name__, _HOME)
