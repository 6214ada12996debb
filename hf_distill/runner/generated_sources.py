"""Sources with `generate: true`: which of their rows the teacher completes, and the examples that it has generated."""

from pathlib import Path

from datasets import Dataset

from ..core.defaults import TRAINING_SEED
from ..core.io import write_json
from ..core.references import reference_kind
from ..core.run_files import GENERATED_DATA, GENERATION
from ..data import Examples, load_examples, split_held_out
from ..errors import DistillError
from ..generation.store import read_facts
from ..recipe.schema import Recipe


def seed_of(recipe: Recipe) -> int:
    """Return the seed of the held-out split."""
    return TRAINING_SEED if recipe.train.seed is None else int(recipe.train.seed)


def generation_rows(recipe: Recipe, count: int, seed: int) -> list[int]:
    """Return the numbers of the rows whose prompts the teacher completes, in ascending order.

    Held-out rows are not among them: they are evaluated with the completions of the data.

    Args:
        recipe: The recipe.
        count: Number of rows of the source.
        seed: Seed of the held-out split.
    """
    numbers = [*range(count)]
    if recipe.data.eval.holdout:
        training, _ = split_held_out(Dataset.from_dict({"row": numbers}), recipe.data.eval.holdout, seed)
        numbers = sorted(training["row"])
    return numbers[: recipe.generate.max_prompts if recipe.generate else None]


def generated_examples(recipe: Recipe, name: str) -> Examples:
    """Load the completions of the teacher for a source.

    Raises:
        DistillError: They are not generated yet.
    """
    folder = Path(recipe.generated_folder(name))
    if not (folder / GENERATION).is_file():
        raise DistillError(
            f"data.{name} has generate: true, and its completions are not in {folder} yet: `hf-distill run RECIPE` "
            "generates them and trains on them, and `hf-distill generate RECIPE` generates them alone."
        )
    return load_examples(str(folder))


def record_generated_data(recipe: Recipe, folder: Path) -> None:
    """Copy the evaluations of the generated data sets of a recipe into its run folder, if it reads any."""
    folders = {
        name: recipe.generated_folder(name) if source.generate else source.path
        for name, source in recipe.data.sources.items()
        if source.generate or reference_kind(source.path) == "path"
    }
    evaluations = {name: read_facts(Path(path)).get("evaluation") for name, path in folders.items()}
    if recorded := {name: evaluation for name, evaluation in evaluations.items() if evaluation}:
        write_json(folder / GENERATED_DATA, recorded)
