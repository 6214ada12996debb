"""The code of the documents runs as it stands."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import build
from transformers import DataCollatorForLanguageModeling

import hf_distill
from hf_distill.losses import LOSSES
from hf_distill.recipe.smoke import byte_tokenizer

ROOT = Path(hf_distill.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [f"The {i}th sentence says something about number {i * i}." for i in range(8)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.fixture
def names(tmp_path):
    """What the blocks take for granted."""
    tokenizer = byte_tokenizer()
    vocab = len(tokenizer)
    build("llama", 0, vocab=vocab).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer([t[:20] for t in TEXTS])["input_ids"]]
    teacher = build("llama", 1, layers=3, vocab=vocab)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return {
        "tokenizer": tokenizer,
        "STUDENT": str(tmp_path / "student"),
        "TEACHER": teacher,
        "TEXTS": TEXTS,
        "OUT": str(tmp_path / "out"),
        "student": build("llama", 0, vocab=vocab),
        "teacher": teacher,
        "second_teacher": build("llama", 2, vocab=vocab),
        "train_rows": Dataset.from_list(rows),
        "eval_rows": Dataset.from_list(rows[:2]),
        "batches": [collator([{"input_ids": row["input_ids"]} for row in rows[:2]])],
    }


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_python_blocks_run(page, number, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registered = dict(LOSSES)
    try:
        exec(compile(blocks(page, "python")[number], f"{page.name}#{number}", "exec"), names)
        assert "trainer" not in names or names["trainer"].state.global_step == 3
    finally:
        LOSSES.clear()
        LOSSES.update(registered)


def test_the_two_drop_in_scripts_differ_in_two_lines(names):
    before, after = blocks(ROOT / "docs" / "migrating-from-trainer.md", "python")
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert [line.strip() for line in added] == [
        "from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, TrainingArguments",
        "from hf_distill import DistillTrainer as Trainer",
        "teacher=TEACHER,",
    ]
    results = []
    for script in (before, after):
        space = dict(names)
        exec(script, space)
        results.append(space["trainer"].evaluate())
    assert "eval_kl" not in results[0]
    assert results[1]["eval_kl"] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_yaml_blocks_are_recipes(page, tmp_path):
    from hf_distill.recipe import load_recipe

    for text in blocks(page, "yaml"):
        (tmp_path / "block.yaml").write_text(text)
        assert load_recipe(str(tmp_path / "block.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
