"""The student as a draft model of its teacher, compared with a naive greedy speculative decoder."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from tiny import build
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import ModelPair, measure_drafts
from hf_distill.analysis.draft import measure_drafts_of
from hf_distill.cli import app
from hf_distill.recipe.load import validate
from hf_distill.report.html import report
from hf_distill.runner.run_results import Run

PROMPTS = [[5, 9, 3, 17, 2], [8, 1, 30], [4, 4, 12, 7]]
ROWS = [[5, 9, 3, 17, 2, 40, 11], [8, 1, 30, 6, 22, 2, 19]]


@pytest.fixture
def teacher():
    model = build("llama", 1).eval()
    model.generation_config.eos_token_id = None  # every generation has all of its tokens
    return model


@pytest.fixture
def draft(teacher):
    """A model that predicts as the teacher does for some tokens only."""
    model = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return model.eval()


def pair_of(teacher):
    def collate(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

    return ModelPair(teacher, None, Dataset.from_list([{"input_ids": row, "labels": row} for row in ROWS]), collate)


@torch.no_grad()
def naive_forwards(teacher, draft, prompt, new_tokens, drafted):
    """Return the number of forward passes of the teacher for `new_tokens` tokens."""
    ids, end, forwards = list(prompt), len(prompt) + new_tokens, 0
    while len(ids) < end:
        proposed = list(ids)
        for _ in range(min(drafted, end - len(ids) - 1)):
            proposed.append(draft(torch.tensor([proposed])).logits[0, -1].argmax().item())
        predicted = teacher(torch.tensor([proposed])).logits[0, len(ids) - 1 :].argmax(-1).tolist()
        forwards += 1
        for token, expected in zip([*proposed[len(ids) :], None], predicted, strict=True):
            ids.append(expected)
            if token != expected:
                break
    return forwards


def test_accepted_tokens_and_acceptance_rate_equal_naive_ones(teacher, draft):
    result = measure_drafts(pair_of(teacher), {"student": lambda: draft}, PROMPTS, new_tokens=16, drafted_tokens=3)
    score = result.drafts["student"]
    forwards = sum(naive_forwards(teacher, draft, prompt, 16, 3) for prompt in PROMPTS)
    assert 16 < forwards < 3 * 16  # some drafts are accepted, and some are not
    assert score.accepted_tokens == pytest.approx(3 * 16 / forwards - 1)
    assert score.equal_outputs == 1
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].softmax(-1) for model in (teacher, draft))
    assert score.acceptance_rate == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), abs=1e-5)
    assert score.parameters == result.teacher_parameters == teacher.num_parameters()
    assert score.tokens_per_second > 0
    assert result.teacher_tokens_per_second > 0


def test_teacher_accepts_all_tokens_of_a_copy(teacher):
    copies = {"student": lambda: copy.deepcopy(teacher)}
    score = measure_drafts(pair_of(teacher), copies, PROMPTS, new_tokens=16, drafted_tokens=3).drafts["student"]
    assert score.accepted_tokens == 3  # 16 tokens in 4 forward passes
    assert score.acceptance_rate == pytest.approx(1, abs=1e-5)


def test_measuring_leaves_the_models_as_they_were(teacher, draft):
    before = draft.generation_config
    measure_drafts(pair_of(teacher), {"student": lambda: draft}, PROMPTS[:1], new_tokens=4)
    assert draft.generation_config is before
    assert not teacher._forward_hooks


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "There are 0 prompts"),
        ([[]], {}, "no empty one"),
        (PROMPTS, {"new_tokens": 0}, "new_tokens is 0"),
        (PROMPTS, {"drafted_tokens": 0}, "drafted_tokens is 0"),
    ],
)
def test_measurements_without_a_number_of_tokens_are_refused(teacher, draft, prompts, options, message):
    with pytest.raises(DistillError, match=message):
        measure_drafts(pair_of(teacher), {"student": lambda: draft}, prompts, **options)


def test_a_draft_model_with_another_vocabulary_is_refused(teacher):
    draft = build("llama", 1, vocab=teacher.config.vocab_size - 3)
    with pytest.raises(DistillError, match="trimmed vocabulary"):
        measure_drafts(pair_of(teacher), {"student": lambda: draft}, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"from_teacher": {"layers": [0], "vocab": {"keep": 100}}}}, "student.from_teacher.vocab"),
        ({"distill": {"cross_tokenizer": {}}}, "distill.cross_tokenizer"),
    ],
)
def test_a_student_with_other_ids_is_refused_before_a_model_is_loaded(changes, message, tmp_path, monkeypatch):
    values = {
        "student": {"model": "smoke:llama/student"},
        "teacher": {"model": "smoke:llama/teacher"},
        "data": {"task": {"path": "smoke:texts"}, "eval": {"holdout": 0.2}},
        "train": {"output_dir": str(tmp_path), "max_steps": 1},
    }
    monkeypatch.setattr("hf_distill.analysis.draft.RunModels.of_run", None)  # it must not load
    with pytest.raises(DistillError, match=message):
        measure_drafts_of(Run(tmp_path, validate({**values, **changes})))


def test_command_measures_all_students_of_a_run(run):
    result = CliRunner().invoke(app, ["draft", str(run.folder), "--new-tokens", "8", "--prompts", "2"])
    assert result.exit_code == 0, result.output
    for text in ("teacher alone", "with before", "with student", "with control", "of 4", "speed-up"):
        assert text in result.output
    written = json.loads((run.folder / "draft.json").read_text())
    assert [*written["drafts"]] == ["before", "student", "control"]
    assert written["prompts"] == 2
    page = report(run).path.read_text()
    assert "Draft model" in page
    assert f"{100 * written['drafts']['student']['acceptance_rate']:.1f}%" in page
