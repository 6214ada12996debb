"""What is measured of a pair is what whole softmaxes say; what went wrong is called by its name."""

import json

import pytest
import torch
from provoked import CASES, healthy
from scipy.stats import pearsonr, spearmanr
from tiny import VOCAB, build, collate, rows
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import Pair
from hf_distill.analysis import agreement as agreement_module
from hf_distill.analysis.agreement import agreement_of
from hf_distill.analysis.diagnosis import diagnose
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe


def pair_of(kind="llama", count=12, **options):
    return Pair(build(kind, 1, layers=3, width=48), build(kind, 0), rows(kind, count), collate, batch_size=4, **options)


def whole(pair):
    """One (teacher's log q [S, V], student's log p [S, V], labels [S]) a row, of all of its positions but the last."""
    found = []
    for row in pair.rows:
        ids = torch.as_tensor(row["input_ids"])[None]
        with torch.no_grad():
            q, p = (model(input_ids=ids, use_cache=False).logits[0, :-1] for model in (pair.teacher, pair.student))
        labels = torch.as_tensor(row["labels"])[1:]
        found.append((q.double().log_softmax(-1), p.double().log_softmax(-1), labels))
    return found


def kl(log_q, log_p):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def mean(values):
    return torch.cat(values).double().mean().item()


@pytest.fixture(scope="module")
def compared():
    pair = pair_of(temperature=3.0, alpha=0.3)
    pair.teacher.eval()
    pair.student.eval()
    return agreement_of(pair, None), whole(pair), pair


def test_divergences_and_losses_are_those_of_whole_softmaxes(compared):
    found, rows_of, _ = compared
    asked = [labels != -100 for _, _, labels in rows_of]
    data = [(q[a], p[a], labels[a]) for (q, p, labels), a in zip(rows_of, asked, strict=True)]
    assert found.tokens == sum(int(a.sum()) for a in asked)
    assert found.vocab_size == VOCAB
    expected = {
        "kl": mean([kl(q, p) for q, p, _ in data]),
        "agreement": mean([q.argmax(-1) == p.argmax(-1) for q, p, _ in data]),
        "teacher_entropy": mean([-(q.exp() * q).sum(-1) for q, _, _ in data]),
        "student_entropy": mean([-(p.exp() * p).sum(-1) for _, p, _ in data]),
        "teacher_nll": mean([-q.gather(1, y[:, None])[:, 0] for q, _, y in data]),
        "student_nll": mean([-p.gather(1, y[:, None])[:, 0] for _, p, y in data]),
        "teacher_accuracy": mean([q.argmax(-1) == y for q, _, y in data]),
        "teacher_worse": mean([q.gather(1, y[:, None]) < p.gather(1, y[:, None]) for q, p, y in data]),
        "soft_entropy": mean([-((q / 3).softmax(-1) * (q / 3).log_softmax(-1)).sum(-1) for q, _, _ in data]),
        "mistakes": mean([(q.argmax(-1) != y) & (q.exp().amax(-1) > 0.5) for q, _, y in data]),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    outside = [q.exp().scatter(1, q.topk(VOCAB // 4).indices, 0).sum(-1) for q, _, _ in data]
    assert found.teacher_tail == pytest.approx(mean(outside), rel=1e-4)


def test_neighbours_are_those_of_the_row_and_no_others(compared):
    found, rows_of, _ = compared
    for offset in (-1, 1):
        divergences, labels_of = [], []
        for q, p, labels in rows_of:
            for i in range(len(labels)):
                j = i + offset
                if labels[i] != -100 and 0 <= j < len(labels) and labels[j] != -100:
                    divergences.append(kl(q[j], p[i])[None])
                    labels_of.append(-q[i, labels[j]][None])
        assert found.kl_at[offset] == pytest.approx(mean(divergences), rel=1e-4)
        assert found.label_at[offset] == pytest.approx(mean(labels_of), rel=1e-4)
    assert found.kl_at[0] == pytest.approx(found.kl, rel=1e-6)


def test_correlations_are_scipy_s_on_the_union_of_the_likeliest(compared):
    found, rows_of, _ = compared
    linear, rank = [], []
    for q, p, labels in rows_of:
        for i in (labels != -100).nonzero().flatten().tolist():
            ids = sorted({*q[i].topk(20).indices.tolist(), *p[i].topk(20).indices.tolist()})
            linear.append(pearsonr(q[i, ids], p[i, ids]).statistic)
            rank.append(spearmanr(q[i, ids], p[i, ids]).statistic)
    assert found.pearson == pytest.approx(sum(linear) / len(linear), abs=1e-4)
    assert found.spearman == pytest.approx(sum(rank) / len(rank), abs=1e-4)


def test_shares_of_the_gradient_are_autograd_s(compared):
    found, rows_of, _ = compared
    norms = {"soft": 0.0, "hard": 0.0}
    for q, p, labels in rows_of:
        for i in (labels != -100).nonzero().flatten().tolist():
            z = p[i].clone().requires_grad_()
            terms = {
                "soft": 0.3 * 9 * kl((q[i] / 3).log_softmax(-1), (z / 3).log_softmax(-1)),
                "hard": -0.7 * z.log_softmax(-1)[labels[i]],
            }
            for name, value in terms.items():
                norms[name] += torch.autograd.grad(value, z)[0].norm().item()
    total = sum(norms.values())
    assert found.gradient == pytest.approx({name: norm / total for name, norm in norms.items()}, rel=1e-3)


def test_parts_add_up_to_the_whole(compared):
    found, _, _ = compared
    assert sum(part.tokens for part in found.positions) == found.tokens
    assert sum(part.tokens * part.kl for part in found.positions) / found.tokens == pytest.approx(found.kl, rel=1e-6)


def test_chunks_change_nothing(compared, monkeypatch):
    found, _, pair = compared
    monkeypatch.setattr(agreement_module, "_CHUNK", 4 * VOCAB * 3)
    small = agreement_of(pair, None)
    for name in ("kl", "pearson", "spearman", "teacher_tail", "soft_entropy"):
        assert getattr(small, name) == pytest.approx(getattr(found, name), rel=1e-5)
    assert small.kl_at == pytest.approx(found.kl_at, rel=1e-5)
    assert small.label_at == pytest.approx(found.label_at, rel=1e-5)


def test_each_model_runs_once_over_what_is_compared(compared):
    _, _, pair = compared
    seen = {"teacher": 0, "student": 0}

    def counting(name):
        def hook(module, args, kwargs, output):
            seen[name] += kwargs["input_ids"].shape[0]

        return getattr(pair, name).register_forward_hook(hook, with_kwargs=True)

    hooks = [counting(name) for name in seen]
    diagnose(pair, None)
    for hook in hooks:
        hook.remove()
    assert seen == {"teacher": len(pair.rows), "student": len(pair.rows)}


@pytest.mark.parametrize("kind", ["bert", "t5", "sequence", "token"])
def test_other_kinds_of_models_are_compared_too(kind):
    found = diagnose(pair_of(kind), None).agreement
    assert found.kl > 0
    assert found.tokens > 0


def test_asked_padding_is_seen():

    from hf_distill.recipe.smoke import byte_tokenizer

    tokenizer = byte_tokenizer()
    pad = tokenizer.pad_token_id
    vocab = len(tokenizer)
    ids = torch.full((8, 20), pad)
    ids[:, :10] = torch.randint(0, 200, (8, 10), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    models = (build("llama", seed, vocab=vocab) for seed in (1, 0))
    found = diagnose(Pair(*models, data, collate, tokenizer, batch_size=4), None)
    assert found.agreement.padding == pytest.approx(9 / 19)
    assert [v.name for v in found.verdicts] == ["wrong_shift_or_mask"]
    assert "padding" in found.verdicts[0].text


def test_ids_that_the_models_lack_are_counted():
    from hf_distill.recipe.smoke import byte_tokenizer

    tokenizer = byte_tokenizer()
    data = [{"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([5, 6, 7, 8])}]
    pair = Pair(build("llama", 1), build("llama", 0), data, collate, tokenizer)
    found = diagnose(pair, None).tokenizer
    assert (found.rows, found.outside) == (1, 0)
    assert found.changed == 0


@pytest.mark.parametrize("name", CASES)
def test_a_provoked_failure_is_called_by_its_name(name):
    pair, logs = CASES[name](0)
    found = diagnose(pair, None, logs)
    assert name in [verdict.name for verdict in found.verdicts]
    assert found.not_looked_at == []
    assert all(verdict.text.endswith(".") and verdict.advice.endswith(".") for verdict in found.verdicts)


def test_a_healthy_run_is_not_called_ill():
    pair, logs = healthy(0)
    assert diagnose(pair, None, logs).verdicts == []


def test_without_logs_nothing_is_said_of_the_training():
    pair, _ = CASES["under_trained"](0)
    found = diagnose(pair, None)
    assert not {"under_trained", "capacity_gap"} & {verdict.name for verdict in found.verdicts}
    assert "train.logging_steps" in found.not_looked_at[0]


def test_a_pair_without_one_of_the_two_is_told():
    with pytest.raises(DistillError, match="no student to diagnose"):
        diagnose(pair_of().beside(None))


def test_the_command_leaves_its_findings_and_reads_the_control_too(tmp_path):
    folder = tmp_path / "run"
    run_recipe(load_recipe("task-mix", [f"train.output_dir={folder}"], smoke=True))
    result = CliRunner().invoke(app, ["diagnose", str(folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    left = json.loads((folder / "diagnosis.json").read_text())
    assert [part["name"] for part in left["agreement"]["sources"]] == ["task", "code"]
    evidence = json.loads((folder / "evidence.json").read_text())
    assert left["agreement"]["kl"] == pytest.approx(evidence["models"]["student"]["kl"], rel=1e-4)
    result = CliRunner().invoke(app, ["diagnose", str(folder), "--student", "control", "--json"])
    told = json.loads(result.stdout[result.stdout.index("{") :])
    assert told["agreement"]["kl"] == pytest.approx(evidence["models"]["control"]["kl"], rel=1e-4)
    assert json.loads((folder / "diagnosis.json").read_text()) == left
