"""A pair is what a run trained with: the same models, the same rows, the same numbers."""

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


def measured(pair, tokens=None):
    """(KL at T = 1, cross entropy of the student, asked tokens), from whole softmaxes."""
    kl = ce = count = 0.0
    for seen in pair.batches(tokens):
        p, q = (source.project().double().log_softmax(-1) for source in (seen.teacher, seen.student))
        kl += (p.exp() * (p - q)).sum().item()
        ce -= q.gather(1, seen.targets.labels[:, None]).sum().item()
        count += len(seen.targets)
    return kl / count, ce / count, count


@pytest.mark.parametrize("name", ["quickstart", "task-mix", "mutual", "cached"])
def test_its_numbers_are_those_of_the_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path / "run", name)
    kl, ce, _ = measured(ModelPair.of_run(run))
    after = run.results["models"]["student"]
    assert math.exp(ce) == pytest.approx(after["perplexity"], rel=1e-5)
    if "kl" in after:
        assert kl == pytest.approx(after["kl"], rel=1e-4)


def test_the_control_is_looked_at_too(tmp_path):
    run = run_of(tmp_path / "run")
    kl, _, _ = measured(ModelPair.of_run(run, "control"))
    assert kl == pytest.approx(run.results["models"]["control"]["kl"], rel=1e-4)


def test_tokens_of_a_mixture_know_their_source(tmp_path):
    pair = ModelPair.of_recipe(load_recipe("task-mix", [f"train.output_dir={tmp_path}"], smoke=True))
    found = torch.cat([seen.source for seen in pair.batches(None)])
    assert pair.sources == ("task", "code")
    assert {*found.tolist()} == {0, 1}


def test_one_forward_of_each_model_and_no_more_rows_than_are_needed():
    pair = ModelPair(build("llama", 1), build("llama", 0), rows("llama", 40), collate, batch_size=4)
    calls = {"teacher": 0, "student": 0}
    for name in calls:
        getattr(pair, name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    asked = [len(seen.targets) for seen in pair.batches(30)]
    assert sum(asked[:-1]) < 30 <= sum(asked)
    assert calls == {"teacher": 2 + len(asked), "student": 2 + len(asked)}  # two short ones measure each output head
    assert pair.with_student(None).batches(1).__next__().student is None


def test_an_empty_slice_is_told():
    empty = [{**row, "labels": row["labels"] * 0 - 100} for row in rows("llama", 4)]
    with pytest.raises(DistillError, match=r"held-out slice is empty.*data\.eval\.holdout"):
        list(ModelPair(build("llama", 1), None, empty, collate).batches())


@pytest.mark.parametrize(("name", "kind"), [("ema", "ema"), ("mtp", "mtp"), ("online", "online")])
def test_a_teacher_that_has_no_model_of_its_own_is_told(tmp_path, name, kind):
    with pytest.raises(DistillError, match=f"of kind {kind}, and has no model before the run"):
        ModelPair.of_recipe(load_recipe(name, [f"train.output_dir={tmp_path}"], smoke=True))


def test_an_average_is_looked_at_where_it_was_exported(tmp_path):
    run = run_of(tmp_path / "run", "ema", "export=adapter")
    with pytest.raises(DistillError, match=r"ema is missing: a run with export=ema writes it"):
        ModelPair.of_run(run)
    run = run_of(tmp_path / "other", "ema", "export=ema")
    kl, _, _ = measured(ModelPair.of_run(run))
    assert kl == pytest.approx(run.results["models"]["student"]["kl"], rel=1e-3)


def test_a_control_that_is_still_trained_is_not_there_yet(tmp_path):
    run = run_of(tmp_path / "run", "quickstart", "control=null")
    assert run.has("student")
    assert not run.has("control")
    (run.folder / "control" / "checkpoint-1").mkdir(parents=True)
    assert not run.has("control")
    with pytest.raises(DistillError, match="control=sft"):
        run.path("control")
