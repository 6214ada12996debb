"""The section of a report on the generated data sets that a run was trained on, from generated_data.json."""

from pydantic import TypeAdapter

from ..core import run_files
from ..core.io import damage_reported, read_json
from ..generation.evaluation import TITLES, Evaluation, Example, measures_table
from ..runner.run_results import Run
from . import plots
from .run_sections import Figure, Section, Table
from .samples import Sample

_NOTES = {
    "distinct": "Distinct-n is the share of different n-grams among those of up to 2,000 completions; it falls with "
    "the number and the length of the texts.",
    "self_bleu": "Self-BLEU is the mean BLEU of a completion with other completions as references, from 0 (diverse) to "
    "100 (equal); of the samples of up to 200 prompts, and of the completions of up to 50 prompts.",
    "no_self_bleu": "Self-BLEU was not computed, because sacrebleu was not installed "
    '(pip install "hf-distill[generate]").',
}
_COLUMNS = ("given", "removed", "set_aside", "kept")


def generated_data(run: Run) -> Section:
    """Acceptance by filter, diversity, lengths and examples of the teacher's completions.

    Raises:
        DistillError: The file is malformed.
    """
    file = run.folder / run_files.GENERATED_DATA
    values = read_json(file)
    with damage_reported(file):
        evaluations = TypeAdapter(dict[str, Evaluation]).validate_python(values)
    text, tables, figures, samples = list[str](), list[Table](), list[Figure](), list[Sample]()
    for name, evaluation in evaluations.items():
        text.append(_summary(name, evaluation))
        if evaluation.filters:
            tables.append(_filters(name, evaluation))
        headings, rows = measures_table(evaluation.measures)
        tables.append(Table([f"data.{name}", *headings], rows))
        plot = plots.token_lengths(evaluation.lengths, TITLES)
        figures.append(Figure(f"generated_{name}", plot, f"Completions of data.{name}."))
        writer = "teacher" if len(evaluations) == 1 else f"teacher for data.{name}"
        samples += [_sample(writer, example) for example in evaluation.examples]
    measures = [part for each in evaluations.values() for part in each.measures.values()]
    has_self_bleu = any(part.get("self_bleu_of_prompts") is not None for part in measures)
    text += [_NOTES["distinct"], _NOTES["self_bleu" if has_self_bleu else "no_self_bleu"]]
    return Section("generated", "Generated data", text, tables, figures, samples=samples, is_empty=not evaluations)


def _summary(name: str, evaluation: Evaluation) -> str:
    kept = evaluation.measures["kept"]
    text = (
        f"data.{name} has {kept['rows']:,} completions of {kept['prompts']:,} prompts, which {evaluation.model} wrote"
    )
    if not evaluation.filters:
        return f"{text}; there were no filters."
    completions = evaluation.filters[0]["given"]
    return f"{text}: {kept['rows'] / max(completions, 1):.1%} of {completions:,} completions passed the filters."


def _filters(name: str, evaluation: Evaluation) -> Table:
    rows = []
    for each in evaluation.filters:
        options = ", ".join(f"{key}: {value}" for key, value in each["options"].items())
        share = f"{each['kept'] / max(each['given'], 1):.1%}"
        rows.append([f"{each['filter']} ({options})" if options else each["filter"], *_counts(each), share])
    return Table([f"filters of data.{name}, in order", "given", "removed", "set aside", "kept", "share"], rows)


def _counts(row: dict) -> list[str]:
    return [f"{row[key]:,}" for key in _COLUMNS]


def _sample(writer: str, example: Example) -> Sample:
    fate = "kept" if example.removed_by is None else f"removed by {example.removed_by}"
    return Sample(example.prompt, example.reference, {f"{writer}, {fate}": example.completion})
