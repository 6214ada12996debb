"""What is measured of a pair is what whole softmaxes say."""

import json
from dataclasses import asdict

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from tiny import VOCAB, build, collate, rows
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.analysis import ModelPair
from hf_distill.analysis import agreement as agreement_module
from hf_distill.analysis.agreement import agreement_of
from hf_distill.analysis.diagnosis import diagnose
from hf_distill.analysis.tokenizer_check import TokenizerCheck, roundtrip
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.smoke import byte_tokenizer


def pair_of(kind="llama", count=12, **options):
    return ModelPair(
        build(kind, 1, layers=3, width=48), build(kind, 0), rows(kind, count), collate, batch_size=4, **options
    )


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
    labels = torch.cat([y for _, _, y in data])
    counts = labels.bincount(minlength=VOCAB).double() / len(labels)
    bias = (len(labels.unique()) - 1) / (2 * len(labels))
    own = -counts[labels].log() + bias
    assert found.counts_nll == pytest.approx(own.mean().item(), rel=1e-5)
    nll = torch.cat([-q.gather(1, y[:, None])[:, 0] for q, _, y in data])
    assert found.below_counts == pytest.approx((nll > own).double().mean().item(), abs=1e-6)
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
    energy, tail = 0.0, 0.0
    for q, p, labels in rows_of:
        for i in (labels != -100).nonzero().flatten().tolist():
            z = p[i].clone().requires_grad_()
            terms = {
                "soft": 0.3 * 9 * kl((q[i] / 3).log_softmax(-1), (z / 3).log_softmax(-1)),
                "hard": -0.7 * z.log_softmax(-1)[labels[i]],
            }
            for name, value in terms.items():
                gradient = torch.autograd.grad(value, z)[0]
                norms[name] += gradient.norm().item()
                if name == "soft":
                    energy += gradient.square().sum().item()
                    tail += gradient.scatter(0, q[i].topk(VOCAB // 4).indices, 0).square().sum().item()
    assert found.soft_tail == pytest.approx(tail / energy, rel=1e-3)
    total = sum(norms.values())
    assert found.gradient == pytest.approx({name: norm / total for name, norm in norms.items()}, rel=1e-3)


def test_parts_add_up_to_the_whole(compared):
    found, rows_of, _ = compared
    assert sum(part.tokens for part in found.positions) == found.tokens
    for part in found.positions:
        first, last = map(int, part.name.split(" to "))
        asked = [int((labels[first : last + 1] != -100).sum()) for _, _, labels in rows_of]
        assert part.tokens == sum(asked), part.name
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
    found = diagnose(pair_of(kind), None)
    assert found.agreement.kl > 0
    assert "a wrong shift: this kind of model predicts in place" in found.not_looked_at
    assert "wrong_shift_or_mask" not in [verdict.name for verdict in found.verdicts]
    json.dumps(asdict(found), allow_nan=False)


def models(vocab):
    return (build("llama", seed, vocab=vocab) for seed in (1, 0))


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_asked_padding_is_seen(masked):
    tokenizer = byte_tokenizer()
    pad = tokenizer.pad_token_id
    ids = torch.full((8, 20), pad)
    ids[:, :10] = torch.randint(0, 200, (8, 10), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    if masked:
        data = [row | {"attention_mask": (torch.arange(20) < 10).long()} for row in data]
    found = diagnose(ModelPair(*models(len(tokenizer)), data, collate, tokenizer, batch_size=4), None)
    # A masked position is not asked; the first of the padding is, by the last token of the text.
    assert found.agreement.padding == pytest.approx(1 / 10 if masked else 9 / 19)
    assert found.agreement.special == pytest.approx(1 / 10 if masked else 10 / 19)
    assert [v.name for v in found.verdicts] == ["wrong_shift_or_mask"]
    assert "padding" in found.verdicts[0].text


def test_a_text_s_end_that_is_the_padding_token_is_no_padding():
    tokenizer = byte_tokenizer()
    ids = torch.randint(0, 200, (8, 20), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = tokenizer.pad_token_id
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(20, dtype=torch.long)} for row in ids]
    found = agreement_of(ModelPair(*models(len(tokenizer)), data, collate, tokenizer, batch_size=4), None)
    assert found.padding == 0
    assert found.special == pytest.approx(1 / 19)
    assert found.asked == pytest.approx(19 / 20)


def test_ids_of_another_tokenizer_do_not_come_back(smollm2_tokenizer):
    text = "Deferred evaluation of annotations was first introduced by the proposal; see the reference manual. " * 4
    ids = torch.tensor(smollm2_tokenizer(text)["input_ids"])
    own = ModelPair(None, None, [{"input_ids": ids}], collate, smollm2_tokenizer)
    assert roundtrip(own) == TokenizerCheck(1, 1.0, 0.0, 0)
    wrong = ModelPair(None, None, [{"input_ids": (ids + 1) % len(smollm2_tokenizer)}], collate, smollm2_tokenizer)
    assert roundtrip(wrong).kept < 0.97
    strange = ModelPair(None, None, [{"input_ids": ids + 40_000}], collate, smollm2_tokenizer)
    assert roundtrip(strange).outside == int((ids + 40_000 >= len(smollm2_tokenizer)).sum()) > 0


def test_ids_that_a_model_lacks_are_told_before_an_embedding_fails():
    data = [{"input_ids": torch.tensor([5, 6, 200, 8]), "labels": torch.tensor([5, 6, 7, 8])}]
    pair = ModelPair(build("llama", 1, vocab=256), build("llama", 0), data, collate)
    with pytest.raises(DistillError, match=r"have the id 200, and the student has 97"):
        diagnose(pair)


def test_vocabularies_that_differ_by_padding_are_compared_on_what_both_have():
    big = build("llama", 1, vocab=VOCAB + 31)
    with torch.no_grad():
        big.lm_head.weight[VOCAB:] = 0.0
    small = build("llama", 0)
    found = agreement_of(ModelPair(big, small, rows("llama", 8), collate, batch_size=4), None)
    big.lm_head.weight = torch.nn.Parameter(big.lm_head.weight[:VOCAB].clone())
    big.resize_token_embeddings(VOCAB)
    same = agreement_of(ModelPair(big, small, rows("llama", 8), collate, batch_size=4), None)
    assert found.vocab_size == VOCAB
    assert found.kl == pytest.approx(same.kl, rel=1e-5)


def test_a_student_that_diverged_is_told_and_not_averaged_away():
    pair = pair_of()
    with torch.no_grad():
        pair.student.lm_head.weight[3] = torch.nan
    with pytest.raises(DistillError, match=r"student's logits are NaN.*lower train.learning_rate"):
        diagnose(pair)


def test_one_asked_token_a_row_has_no_neighbours_and_leaves_plain_json():
    data = [row | {"labels": torch.where(torch.arange(12) == 4, row["input_ids"], -100)} for row in rows("llama", 8)]
    data = [row for row in data if row["attention_mask"][4]]
    found = diagnose(ModelPair(build("llama", 1), build("llama", 0), data, collate), None)
    assert found.agreement.kl_at.keys() == found.agreement.label_at.keys() == {0}
    assert any("side by side" in line for line in found.not_looked_at)
    json.dumps(asdict(found), allow_nan=False)


def test_a_pair_without_one_of_the_two_is_told():
    with pytest.raises(DistillError, match="no student to diagnose"):
        diagnose(pair_of().with_student(None))


def test_the_command_leaves_its_findings_and_reads_the_control_too(tmp_path):
    folder = tmp_path / "run"
    run_recipe(load_recipe("task-mix", [f"train.output_dir={folder}"], smoke=True))
    result = CliRunner().invoke(app, ["diagnose", str(folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert 0 < result.output.index("This is a smoke run: its models are tiny") < result.output.index("held-out tokens")
    left = json.loads((folder / "diagnosis.json").read_text())
    assert left["verdicts"] == []
    assert left["conclusion"].startswith("This is a smoke run")
    assert [part["name"] for part in left["agreement"]["sources"]] == ["task", "code"]
    evidence = json.loads((folder / "results.json").read_text())
    assert left["agreement"]["kl"] == pytest.approx(evidence["models"]["student"]["kl"], rel=1e-4)
    result = CliRunner().invoke(app, ["diagnose", str(folder), "--student", "control", "--json"])
    told = json.loads(result.stdout[result.stdout.index("{") :])
    assert told["agreement"]["kl"] == pytest.approx(evidence["models"]["control"]["kl"], rel=1e-4)
    assert told["agreement"]["gradient"] == {"hard": 1.0}
    assert any(line.endswith("alpha is 0, so the student heard no teacher") for line in told["not_looked_at"])
    result = CliRunner().invoke(app, ["diagnose", str(folder), "--student", str(folder / "control"), "--json"])
    assert json.loads(result.stdout[result.stdout.index("{") :])["agreement"]["kl"] == told["agreement"]["kl"]
    assert json.loads((folder / "diagnosis.json").read_text()) == left
    result = CliRunner().invoke(app, ["diagnose", str(folder), "--student", "contrl"])
    assert "--student is student, control, or the folder of a model" in str(result.exception)
    (folder / "metrics.jsonl").unlink()
    result = CliRunner().invoke(app, ["diagnose", str(folder)])
    assert f"{folder / 'metrics.jsonl'} is missing: `hf-distill run RECIPE` writes it" in str(result.exception)
