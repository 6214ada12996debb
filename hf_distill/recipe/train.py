"""The section `train` of a recipe: fields of `transformers.TrainingArguments`, read from the packaged `schema.json`."""

from functools import reduce
from operator import or_
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from ..core.strict_model import Name, StrictModel
from .losses import packaged_schema
from .ranges import RANGES, SHARES_OR_STEPS

_JSON_TYPES: dict[str, type | UnionType] = {
    "integer": int,
    "number": int | float,
    "string": str,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": NoneType,
}


class TrainBase(StrictModel):
    """Training arguments: any field of transformers.TrainingArguments. output_dir is the folder of the run."""

    @model_validator(mode="before")
    @classmethod
    def _yaml_no(cls, values: object) -> object:
        """Restore the string "no": YAML reads the bare word in `eval_strategy: no` as False."""
        if not isinstance(values, dict):
            return values
        specs = packaged_schema()["properties"]["train"]["properties"]
        return {
            key: "no" if value is False and "no" in specs.get(key, {}).get("enum", ()) else value
            for key, value in values.items()
        }

    @model_validator(mode="after")
    def _check_early_stopping(self: "Train") -> "Train":
        patience, strategy = self.early_stopping_patience, self.eval_strategy
        if patience is None:
            return self
        problems = []
        if strategy in (None, "no"):
            problems.append(
                "it needs evaluations during training: set eval_strategy to epoch, or to steps with eval_steps"
            )
        elif self.save_strategy not in (None, "best", strategy):
            problems.append(
                f"save_strategy is {self.save_strategy} and eval_strategy is {strategy}; they must be the same: remove "
                "save_strategy"
            )
        elif strategy == "steps" and self.save_steps and self.eval_steps and self.save_steps % self.eval_steps:
            problems.append(
                f"save_steps is {self.save_steps}; it must be a multiple of eval_steps, which is {self.eval_steps}"
            )
        if self.load_best_model_at_end is False:
            problems.append("it always exports the best checkpoint: remove load_best_model_at_end")
        if problems:
            raise ValueError("early_stopping_patience: " + "; ".join(problems))
        return self

    @model_validator(mode="after")
    def _check_step_counts(self) -> Self:
        """Check that numbers of steps above 1 are whole. Below 1 they are a share of all steps."""
        steps = {name: getattr(self, name) for name in SHARES_OR_STEPS}
        broken = [f"{name} is {steps[name]}" for name in steps if (steps[name] or 0) > 1 and steps[name] % 1]
        if broken:
            raise ValueError(f"{'; '.join(broken)}; give a whole number of steps, or a share of all steps below 1")
        return self

    @model_validator(mode="after")
    def _check_push_to_hub(self: "Train") -> "Train":
        if self.hub_token:
            raise ValueError("hub_token: a recipe must not contain a token: run `hf auth login`, or set HF_TOKEN")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs a repository: set hub_model_id to org/name")
        if self.push_to_hub and self.hub_revision:
            raise ValueError("hub_revision: the student is published on the main branch: remove it")
        if self.push_to_hub and self.hub_strategy not in (None, "end"):
            raise ValueError(
                f"hub_strategy is {self.hub_strategy}; only end is possible in a recipe, because the student is "
                "published with its results when the run is complete. To push checkpoints, use DistillTrainer in a "
                "script"
            )
        return self


def _train_fields() -> dict[str, tuple[object, object]]:
    fields: dict[str, tuple[object, object]] = {}
    for name, spec in packaged_schema()["properties"]["train"]["properties"].items():
        kinds = [Literal[tuple(spec["enum"])]] if "enum" in spec else [_JSON_TYPES[t] for t in spec["type"]]
        fields[name] = (reduce(or_, kinds) | None, Field(None, **RANGES.get(name, {})))
    fields["output_dir"] = (Name, Field(min_length=1))
    return fields


if TYPE_CHECKING:
    Train = Any
else:
    Train = create_model("Train", __base__=TrainBase, __doc__=TrainBase.__doc__, **_train_fields())
