"""The code of the documentation runs, its recipes validate, and its links lead to files."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import build, collate, speech_rows, whisper
from tiny_vision import vision_examples, vision_processor, vlm
from transformers import DataCollatorForLanguageModeling

import hf_distill
from hf_distill.losses import LOSSES
from hf_distill.recipe.smoke import byte_tokenizer

ROOT = Path(hf_distill.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [
    ROOT / name
    for name in (
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "benchmarks/README.md",
        "recipes/README.md",
        "examples/README.md",
    )
]
TEXTS = [f"The {i}th sentence says something about number {i * i}." for i in range(8)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.fixture
def names(tmp_path):
    """Names that the code blocks use without defining them."""
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
        "teacher_tokenizer": byte_tokenizer(),
        "second_teacher": build("llama", 2, vocab=vocab),
        "train_rows": Dataset.from_list(rows),
        "eval_rows": Dataset.from_list(rows[:2]),
        "whisper_teacher": whisper(decoder_layers=3),
        "speech_rows": speech_rows(),
        "speech_collator": collate,
        "processor": None,
        "word_error_rate": lambda predictions: {"wer": 1.0},
        "batches": [collator([{"input_ids": row["input_ids"]} for row in rows[:2]])],
    }


def write_chats() -> None:
    """Write the conversations that the page Getting started reads: six rows to train on, and one that is held out."""
    rows = [
        {"messages": [{"role": "user", "content": text[:12]}, {"role": "assistant", "content": text[12:]}]}
        for text in TEXTS[:7]
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))


def vision_names():
    """Names of the code blocks for vision-language models."""
    return {
        "vision_student": vlm("qwen", 0),
        "vision_teacher": vlm("qwen", 1),
        "processor": vision_processor("qwen"),
        "PICTURES": [row["images"][0] for row in vision_examples(4, counts=(1,))],
    }


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_python_blocks_run(page, number, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_chats()
    registered, block = dict(LOSSES), blocks(page, "python")[number]
    block = re.sub(r"^MODEL = .*", f"MODEL = {names['STUDENT']!r}", block, flags=re.M)
    block = block.replace("max_steps=100", "max_steps=3")
    names |= vision_names() if "vision_student" in block else {}
    try:
        exec(compile(block, f"{page.name}#{number}", "exec"), names)
        assert "trainer" not in names or names["trainer"].state.global_step == 3
    finally:
        LOSSES.clear()
        LOSSES.update(registered)


def test_the_diff_of_the_migration_page_leads_from_a_trainer_script_to_the_script_that_distills(names):
    page = ROOT / "docs" / "migrating-from-trainer.md"
    (after,), (diff,) = blocks(page, "python"), blocks(page, "diff")
    before = after
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert after.count(new) == 1
        before = before.replace(new, "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+")))
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


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_architecture_page_lists_every_package():
    tree = blocks(ROOT / "docs" / "architecture.md", "")[0]
    listed = set(re.findall(r"^  (\w+)/", tree, flags=re.M))
    assert listed == {path.parent.name for path in (ROOT / "hf_distill").glob("*/__init__.py")}


def signals_of(teacher, student, inputs):
    """What a teacher returns for a batch."""
    from hf_distill.core.targets import Targets

    teacher.prepare(student, torch.device("cpu"))
    targets = Targets.from_batch(inputs, shift=True)
    return targets, teacher(inputs, targets, {})


def test_the_averaging_teacher_returns_the_mean_of_probabilities_in_the_order_of_the_targets(
    names, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    exec(blocks(ROOT / "docs" / "custom-teachers.md", "python")[0], names)
    (inputs,) = names["batches"]
    targets, signals = signals_of(
        names["AverageTeacher"](names["teacher"], names["second_teacher"]), names["student"], inputs
    )
    with torch.no_grad():
        probabilities = sum(
            names[name](inputs["input_ids"]).logits.softmax(-1) for name in ("teacher", "second_teacher")
        )
    kept = inputs["labels"][:, 1:] != -100
    expected = (probabilities[:, :-1] / 2)[kept]
    assert targets.labels.equal(inputs["labels"][:, 1:][kept])
    torch.testing.assert_close(signals.logits.project().exp(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("divergence", "is_equal"), [("forward_kl", True), ("reverse_kl", False)])
def test_only_forward_kl_to_several_teachers_has_the_gradient_of_the_mean_teacher(divergence, is_equal):
    generator = torch.Generator().manual_seed(0)
    teachers = torch.randn(2, 5, 11, dtype=torch.float64, generator=generator)
    student = torch.randn(5, 11, dtype=torch.float64, generator=generator).requires_grad_()
    kl = LOSSES[divergence].function

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), student)[0]

    mixed = gradient(0.75 * kl(student, teachers[0], None) + 0.25 * kl(student, teachers[1], None))
    mean = (0.75 * teachers[0].softmax(-1) + 0.25 * teachers[1].softmax(-1)).log()
    assert torch.allclose(mixed, gradient(kl(student, mean, None)), atol=1e-9) is is_equal


def test_the_script_of_the_early_stopping_page_resumes_when_it_is_run_again(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = blocks(ROOT / "docs" / "early-stopping.md", "python")
    results = []
    for seed in (0, 3):  # a resumed run takes its weights from the checkpoint, whatever the student begins with
        space = names | {"student": build("llama", seed, vocab=len(names["tokenizer"]))}
        exec(script, space)
        state = space["trainer"].state
        results.append((state.global_step, state.best_metric, space["trainer"].evaluate()["eval_kl"]))
    assert results[0] == results[1]
    assert results[0][1] == pytest.approx(results[0][2], rel=1e-5)
