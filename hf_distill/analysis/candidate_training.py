"""Trains the candidates of a search by successive halving, with one teacher and the same data for all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import log
from pathlib import Path
from typing import Any, Generic

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..core.processes import run_on_main
from ..errors import DistillError
from ..recipe.schema import Recipe
from ..runner.cache_writer import write_smoke_cache
from ..runner.model_factory import check_launch
from ..runner.single_run import RunContext, held_out_metrics
from ..trainer.config import DistillConfig
from .search_state import delete_checkpoints
from .successive_halving import C, Rung, ranked

_REUSABLE_KINDS = {"frozen", "cached", "adapter_base"}  # of teachers that training a candidate does not change


@dataclass
class CandidateTraining(Generic[C]):
    """Trains the candidates of a search, each from its last rung, so that no step is trained twice.

    recipe:   its models and data are loaded when the first candidate needs them
    args:     the training arguments of the recipe
    folder:   of the search
    by:       criterion: "nll" or "kl"
    on_stage: called with a short description of each stage as it begins
    describe: returns a short description of a candidate
    prepare:  prepares the context for a candidate; returns the training arguments that differ
    save:     writes the measurements of all candidates
    """

    recipe: Recipe
    args: DistillConfig
    folder: Path
    by: str
    on_stage: Callable[[str], None]
    describe: Callable[[C], str]
    prepare: Callable[[RunContext, C], dict[str, Any]]
    save: Callable[[], None]
    _context: RunContext | None = field(default=None, init=False)

    def run(self, candidates: list[C], plan: list[tuple[int, int]]) -> C:
        """Train the candidates rung by rung and return the winner.

        Args:
            candidates: all candidates; their rungs are appended.
            plan: (number of candidates, step) of each rung; at step 0 they are evaluated untrained.
        """
        remaining = candidates
        for count, step in plan:
            remaining = ranked(remaining, self.by)[:count]
            run_on_main(partial(delete_checkpoints, self.folder, candidates, remaining))
            for candidate in remaining:
                if candidate.rungs and candidate.rungs[-1].step >= step:
                    continue
                self._context = self._context or self._load_context()
                self.on_stage(f"{self.describe(candidate)}: {f'to step {step}' if step else 'before training'}")
                candidate.rungs.append(self._train(self._context, candidate, step))
                run_on_main(self.save)
        return ranked(remaining, self.by)[0]

    def _load_context(self) -> RunContext:
        """Load models and data once for all candidates.

        Raises:
            DistillError: the criterion is the KL, and a cache has no full distributions to compute it from.
        """
        check_launch(self.recipe)
        write_smoke_cache(self.recipe, self.on_stage)
        context = RunContext(self.recipe, self.args, self.folder, [], self.on_stage)
        sparse = [path for path, facts in context.models.caches.items() if facts["kind"] != "hidden"]
        if self.by == "kl" and sparse:
            raise DistillError(
                f"The cache {sparse[0]} has no full distributions, so the KL cannot be computed: judge by nll, or "
                "write a cache of kind hidden."
            )
        return context

    def _train(self, context: RunContext, candidate: C, step: int) -> Rung:
        """Train a candidate from its last rung to a step, and evaluate it.

        After a crash the newest checkpoint may belong to a rung that was not saved in the file; that rung is trained
        again.
        """
        folder = context.folder / candidate.name
        changes = {
            **self.prepare(context, candidate),
            "output_dir": str(folder),
            "save_strategy": "no",
            "save_total_limit": None,
            "save_only_model": False,
            "load_best_model_at_end": False,
            "eval_strategy": "no",
            "push_to_hub": False,
        }
        trainer = context.trainer(candidate.name, changes=changes)
        if step:
            trainer.add_callback(_StopAt(step))
            last = candidate.rungs[-1].step if candidate.rungs else 0
            set_seed(context.args.seed)
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{last}") if last else None)
        metrics = held_out_metrics(trainer.evaluate())
        return Rung(step, log(metrics["perplexity"]), metrics.get("kl"), metrics.get("agreement"))


class _StopAt(TrainerCallback):
    """Stop training at a step, with a checkpoint to continue from."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True
            control.should_save = state.global_step < state.max_steps


def search_problems(recipe: Recipe, by: str) -> list[str]:
    """List why short runs of a recipe cannot be compared; empty if they can.

    Args:
        recipe: the recipe.
        by: criterion: "nll" or "kl".
    """
    problems = []
    if by not in ("nll", "kl"):
        problems.append(f"by is {by!r}; possible values are nll and kl")
    if not (recipe.train.max_steps or 0) > 0:
        problems.append("the recipe counts epochs: set train.max_steps, the number of steps of the winner")
    if recipe.on_policy:
        problems.append("the recipe is on-policy, so each candidate would be trained on different texts")
    if recipe.stages:
        problems.append("the recipe has stages: search for one of its stages, in a separate recipe")
    if not recipe.kinds <= _REUSABLE_KINDS:
        problems.append(
            f"a teacher of kind {', '.join(sorted(recipe.kinds - _REUSABLE_KINDS))} changes with the student, or is "
            "on a server, and all candidates are compared with one teacher that is loaded once; use a teacher of kind "
            f"{', '.join(sorted(_REUSABLE_KINDS))}"
        )
    return problems
