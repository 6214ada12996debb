"""A pair has the models and rows of its run, and gives the same metrics."""

import math

import pytest
import torch
from tiny import build, collate, rows

from hf_distill import DistillError
from hf_distill.analysis import ModelPair, open_run
from hf_distill.recipe import load_recipe, run_recipe


def run_of(folder, name="quickstart", *overrides):
    run_recipe(load_recipe(name, [f"train.output_dir={folder}", *overrides], smoke=True))
    return open_run(folder)


def naive_metrics(pair, tokens=None):
    """(KL at T = 1, cross entropy of the student, number of target tokens), from full softmaxes."""
    kl = ce = count = 0.0
    for batch in pair.batches(tokens):
        p, q = (source.project().double().log_softmax(-1) for source in (batch.teacher, batch.student))
        kl += (p.exp() * (p - q)).sum().item()
        ce -= q.gather(1, batch.targets.labels[:, None]).sum().item()
        count += len(batch.targets)
    return kl / count, ce / count, count


@pytest.mark.parametrize("name", ["quickstart", "task-mix", "mutual", "cached"])
def test_metrics_of_a_pair_equal_those_of_the_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path / "run", name, "data.task.path=package:builtins")
    kl, ce, _ = naive_metrics(ModelPair.of_run(run))
    after = run.results["models"]["student"]
    assert math.exp(ce) == pytest.approx(after["perplexity"], rel=1e-5)
    if "kl" in after:
        assert kl == pytest.approx(after["kl"], rel=1e-4)


def test_the_control_can_be_the_student_of_a_pair(tmp_path):
    run = run_of(tmp_path / "run")
    kl, _, _ = naive_metrics(ModelPair.of_run(run, "control"))
    assert kl == pytest.approx(run.results["models"]["control"]["kl"], rel=1e-4)


def test_each_token_of_a_mixture_has_the_index_of_the_source(tmp_path):
    pair = ModelPair.of_recipe(load_recipe("task-mix", [f"train.output_dir={tmp_path}"], smoke=True))
    sources = torch.cat([batch.source for batch in pair.batches(None)])
    assert pair.sources == ("task", "code")
    assert {*sources.tolist()} == {0, 1}


def test_each_batch_takes_one_forward_of_each_model_and_no_batch_is_wasted():
    pair = ModelPair(build("llama", 1), build("llama", 0), rows("llama", 40), collate, batch_size=4)
    calls = {"teacher": 0, "student": 0}
    for name in calls:
        getattr(pair, name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    counts = [len(batch.targets) for batch in pair.batches(30)]
    assert sum(counts[:-1]) < 30 <= sum(counts)
    assert calls == {
        "teacher": 2 + len(counts),
        "student": 2 + len(counts),
    }  # two short forwards measure each output head
    assert pair.with_student(None).batches(1).__next__().student is None


def test_rows_without_target_tokens_give_an_error():
    empty = [{**row, "labels": row["labels"] * 0 - 100} for row in rows("llama", 4)]
    with pytest.raises(DistillError, match=r"held-out rows are empty.*data\.eval\.holdout"):
        list(ModelPair(build("llama", 1), None, empty, collate).batches())


@pytest.mark.parametrize(("name", "kind"), [("ema", "ema"), ("mtp", "mtp"), ("online", "online")])
def test_a_teacher_without_a_model_before_the_run_gives_an_error(tmp_path, name, kind):
    with pytest.raises(DistillError, match=f"of kind {kind}, so it has no model before the run"):
        ModelPair.of_recipe(load_recipe(name, [f"train.output_dir={tmp_path}"], smoke=True))


def test_an_ema_teacher_can_be_compared_only_if_it_was_exported(tmp_path):
    run = run_of(tmp_path / "run", "ema", "export=adapter")
    with pytest.raises(DistillError, match=r"ema is missing: a run with export=ema writes it"):
        ModelPair.of_run(run)
    run = run_of(tmp_path / "other", "ema", "export=ema")
    kl, _, _ = naive_metrics(ModelPair.of_run(run))
    assert kl == pytest.approx(run.results["models"]["student"]["kl"], rel=1e-3)


def test_a_control_with_only_checkpoints_counts_as_missing(tmp_path):
    run = run_of(tmp_path / "run", "quickstart", "control=null")
    assert run.has("student")
    assert not run.has("control")
    (run.folder / "control" / "checkpoint-1").mkdir(parents=True)
    assert not run.has("control")
    with pytest.raises(DistillError, match="control=sft"):
        run.path("control")
