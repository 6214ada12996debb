"""Measurements of a pair equal those of naive full softmaxes."""

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


def naive_softmaxes(pair):
    """For each row (teacher's log q [S, V], student's log p [S, V], labels [S]) of all positions but the last."""
    results = []
    for row in pair.rows:
        ids = torch.as_tensor(row["input_ids"])[None]
        with torch.no_grad():
            q, p = (model(input_ids=ids, use_cache=False).logits[0, :-1] for model in (pair.teacher, pair.student))
        labels = torch.as_tensor(row["labels"])[1:]
        results.append((q.double().log_softmax(-1), p.double().log_softmax(-1), labels))
    return results


def kl(log_q, log_p):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def mean(values):
    return torch.cat(values).double().mean().item()


@pytest.fixture(scope="module")
def compared():
    pair = pair_of(temperature=3.0, alpha=0.3)
    pair.teacher.eval()
    pair.student.eval()
    return agreement_of(pair, None), naive_softmaxes(pair), pair


def test_measures_equal_those_of_naive_softmaxes(compared):
    measured, rows_of, _ = compared
    masks = [labels != -100 for _, _, labels in rows_of]
    data = [(q[m], p[m], labels[m]) for (q, p, labels), m in zip(rows_of, masks, strict=True)]
    assert measured.tokens == sum(int(m.sum()) for m in masks)
    assert measured.vocab_size == VOCAB
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
        "confident_teacher_errors": mean([(q.argmax(-1) != y) & (q.exp().amax(-1) > 0.5) for q, _, y in data]),
    }
    for name, value in expected.items():
        assert getattr(measured, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    labels = torch.cat([y for _, _, y in data])
    counts = labels.bincount(minlength=VOCAB).double() / len(labels)
    bias = (len(labels.unique()) - 1) / (2 * len(labels))
    unigram_nll = -counts[labels].log() + bias
    assert measured.counts_nll == pytest.approx(unigram_nll.mean().item(), rel=1e-5)
    nll = torch.cat([-q.gather(1, y[:, None])[:, 0] for q, _, y in data])
    assert measured.below_counts == pytest.approx((nll > unigram_nll).double().mean().item(), abs=1e-6)
    outside = [q.exp().scatter(1, q.topk(VOCAB // 4).indices, 0).sum(-1) for q, _, _ in data]
    assert measured.teacher_tail == pytest.approx(mean(outside), rel=1e-4)


def test_shifted_measures_use_only_neighbors_of_the_same_row(compared):
    measured, rows_of, _ = compared
    for offset in (-1, 1):
        divergences, labels_of = [], []
        for q, p, labels in rows_of:
            for i in range(len(labels)):
                j = i + offset
                if labels[i] != -100 and 0 <= j < len(labels) and labels[j] != -100:
                    divergences.append(kl(q[j], p[i])[None])
                    labels_of.append(-q[i, labels[j]][None])
        assert measured.kl_at[offset] == pytest.approx(mean(divergences), rel=1e-4)
        assert measured.label_at[offset] == pytest.approx(mean(labels_of), rel=1e-4)
    assert measured.kl_at[0] == pytest.approx(measured.kl, rel=1e-6)


def test_correlations_equal_those_of_scipy_on_the_union_of_the_likeliest_ids(compared):
    measured, rows_of, _ = compared
    linear, rank = [], []
    for q, p, labels in rows_of:
        for i in (labels != -100).nonzero().flatten().tolist():
            ids = sorted({*q[i].topk(20).indices.tolist(), *p[i].topk(20).indices.tolist()})
            linear.append(pearsonr(q[i, ids], p[i, ids]).statistic)
            rank.append(spearmanr(q[i, ids], p[i, ids]).statistic)
    assert measured.pearson == pytest.approx(sum(linear) / len(linear), abs=1e-4)
    assert measured.spearman == pytest.approx(sum(rank) / len(rank), abs=1e-4)


def test_gradient_shares_equal_those_of_autograd(compared):
    measured, rows_of, _ = compared
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
    assert measured.soft_tail == pytest.approx(tail / energy, rel=1e-3)
    total = sum(norms.values())
    assert measured.gradient == pytest.approx({name: norm / total for name, norm in norms.items()}, rel=1e-3)


def test_parts_add_up_to_all_tokens(compared):
    measured, rows_of, _ = compared
    assert sum(part.tokens for part in measured.positions) == measured.tokens
    for part in measured.positions:
        first, last = map(int, part.name.split(" to "))
        counts = [int((labels[first : last + 1] != -100).sum()) for _, _, labels in rows_of]
        assert part.tokens == sum(counts), part.name
    assert sum(part.tokens * part.kl for part in measured.positions) / measured.tokens == pytest.approx(
        measured.kl, rel=1e-6
    )


def test_chunk_size_does_not_change_the_measures(compared, monkeypatch):
    measured, _, pair = compared
    monkeypatch.setattr(agreement_module, "_CHUNK_BYTES", 4 * VOCAB * 3)
    small = agreement_of(pair, None)
    for name in ("kl", "pearson", "spearman", "teacher_tail", "soft_entropy"):
        assert getattr(small, name) == pytest.approx(getattr(measured, name), rel=1e-5)
    assert small.kl_at == pytest.approx(measured.kl_at, rel=1e-5)
    assert small.label_at == pytest.approx(measured.label_at, rel=1e-5)


def test_each_model_runs_once_over_the_rows(compared):
    _, _, pair = compared
    forwarded = {"teacher": 0, "student": 0}

    def counting(name):
        def hook(module, args, kwargs, output):
            forwarded[name] += kwargs["input_ids"].shape[0]

        return getattr(pair, name).register_forward_hook(hook, with_kwargs=True)

    hooks = [counting(name) for name in forwarded]
    diagnose(pair, None)
    for hook in hooks:
        hook.remove()
    assert forwarded == {"teacher": len(pair.rows), "student": len(pair.rows)}


@pytest.mark.parametrize("kind", ["bert", "t5", "sequence", "token"])
def test_models_that_are_not_causal_are_compared_too(kind):
    measured = diagnose(pair_of(kind), None)
    assert measured.agreement.kl > 0
    assert "a wrong shift: this type of model predicts each label at its own position" in measured.not_looked_at
    assert "wrong_shift_or_mask" not in [verdict.name for verdict in measured.verdicts]
    json.dumps(asdict(measured), allow_nan=False)


def models(vocab):
    return (build("llama", seed, vocab=vocab) for seed in (1, 0))


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_padding_among_the_target_tokens_is_detected(masked):
    tokenizer = byte_tokenizer()
    pad = tokenizer.pad_token_id
    ids = torch.full((8, 20), pad)
    ids[:, :10] = torch.randint(0, 200, (8, 10), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    if masked:
        data = [row | {"attention_mask": (torch.arange(20) < 10).long()} for row in data]
    measured = diagnose(ModelPair(*models(len(tokenizer)), data, collate, tokenizer, batch_size=4), None)
    # A masked position is no target; the first padding token is one, because the last token of the text predicts it.
    assert measured.agreement.padding == pytest.approx(1 / 10 if masked else 9 / 19)
    assert measured.agreement.special == pytest.approx(1 / 10 if masked else 10 / 19)
    assert [v.name for v in measured.verdicts] == ["wrong_shift_or_mask"]
    assert "padding" in measured.verdicts[0].text


def test_an_end_of_text_token_that_is_the_padding_token_does_not_count_as_padding():
    tokenizer = byte_tokenizer()
    ids = torch.randint(0, 200, (8, 20), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = tokenizer.pad_token_id
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(20, dtype=torch.long)} for row in ids]
    measured = agreement_of(ModelPair(*models(len(tokenizer)), data, collate, tokenizer, batch_size=4), None)
    assert measured.padding == 0
    assert measured.special == pytest.approx(1 / 19)
    assert measured.target_share == pytest.approx(19 / 20)


def test_ids_of_another_tokenizer_are_detected_by_a_round_trip(smollm2_tokenizer):
    text = "Deferred evaluation of annotations was first introduced by the proposal; see the reference manual. " * 4
    ids = torch.tensor(smollm2_tokenizer(text)["input_ids"])
    correct = ModelPair(None, None, [{"input_ids": ids}], collate, smollm2_tokenizer)
    assert roundtrip(correct) == TokenizerCheck(1, 1.0, 0.0, 0)
    wrong = ModelPair(None, None, [{"input_ids": (ids + 1) % len(smollm2_tokenizer)}], collate, smollm2_tokenizer)
    assert roundtrip(wrong).kept < 0.97
    too_large = ModelPair(None, None, [{"input_ids": ids + 40_000}], collate, smollm2_tokenizer)
    assert roundtrip(too_large).outside == int((ids + 40_000 >= len(smollm2_tokenizer)).sum()) > 0


def test_ids_that_a_model_lacks_give_an_error_before_an_embedding_fails():
    data = [{"input_ids": torch.tensor([5, 6, 200, 8]), "labels": torch.tensor([5, 6, 7, 8])}]
    pair = ModelPair(build("llama", 1, vocab=256), build("llama", 0), data, collate)
    with pytest.raises(DistillError, match=r"have the id 200, but the student has only 97 ids"):
        diagnose(pair)


def test_vocabularies_that_differ_by_padding_are_compared_on_the_common_ids():
    big = build("llama", 1, vocab=VOCAB + 31)
    with torch.no_grad():
        big.lm_head.weight[VOCAB:] = 0.0
    small = build("llama", 0)
    measured = agreement_of(ModelPair(big, small, rows("llama", 8), collate, batch_size=4), None)
    big.lm_head.weight = torch.nn.Parameter(big.lm_head.weight[:VOCAB].clone())
    big.resize_token_embeddings(VOCAB)
    same = agreement_of(ModelPair(big, small, rows("llama", 8), collate, batch_size=4), None)
    assert measured.vocab_size == VOCAB
    assert measured.kl == pytest.approx(same.kl, rel=1e-5)


def test_nan_logits_give_an_error_instead_of_a_mean():
    pair = pair_of()
    with torch.no_grad():
        pair.student.lm_head.weight[3] = torch.nan
    with pytest.raises(DistillError, match=r"student's logits are NaN.*lower train.learning_rate"):
        diagnose(pair)


def test_one_target_token_per_row_gives_no_shifted_measures_and_valid_json():
    data = [row | {"labels": torch.where(torch.arange(12) == 4, row["input_ids"], -100)} for row in rows("llama", 8)]
    data = [row for row in data if row["attention_mask"][4]]
    measured = diagnose(ModelPair(build("llama", 1), build("llama", 0), data, collate), None)
    assert measured.agreement.kl_at.keys() == measured.agreement.label_at.keys() == {0}
    assert any("no two target tokens are adjacent" in line for line in measured.not_looked_at)
    json.dumps(asdict(measured), allow_nan=False)


def test_a_pair_without_a_student_gives_an_error():
    with pytest.raises(DistillError, match="no student to diagnose"):
        diagnose(pair_of().with_student(None))


def test_the_command_writes_results_and_diagnoses_the_control_too(tmp_path):
    folder = tmp_path / "run"
    run_recipe(load_recipe("task-mix", [f"train.output_dir={folder}"], smoke=True))
    result = CliRunner().invoke(app, ["diagnose", str(folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert (
        0
        < result.output.index("This is a smoke run: its models are tiny")
        < result.output.index("held-out target tokens")
    )
    written = json.loads((folder / "diagnosis.json").read_text())
    assert written["verdicts"] == []
    assert written["conclusion"].startswith("This is a smoke run")
    assert [part["name"] for part in written["agreement"]["sources"]] == ["task", "code"]
    evidence = json.loads((folder / "results.json").read_text())
    assert written["agreement"]["kl"] == pytest.approx(evidence["models"]["student"]["kl"], rel=1e-4)
    result = CliRunner().invoke(app, ["diagnose", str(folder), "--student", "control", "--json"])
    control = json.loads(result.stdout[result.stdout.index("{") :])
    assert control["agreement"]["kl"] == pytest.approx(evidence["models"]["control"]["kl"], rel=1e-4)
    assert control["agreement"]["gradient"] == {"hard": 1.0}
    assert any(
        line.endswith("alpha is 0, so the student was trained without the teacher's logits")
        for line in control["not_looked_at"]
    )
    result = CliRunner().invoke(app, ["diagnose", str(folder), "--student", str(folder / "control"), "--json"])
    assert json.loads(result.stdout[result.stdout.index("{") :])["agreement"]["kl"] == control["agreement"]["kl"]
    assert json.loads((folder / "diagnosis.json").read_text()) == written
    result = CliRunner().invoke(app, ["diagnose", str(folder), "--student", "contrl"])
    assert "--student is student, control, or the folder of a model" in str(result.exception)
    (folder / "metrics.jsonl").unlink()
    result = CliRunner().invoke(app, ["diagnose", str(folder)])
    assert f"{folder / 'metrics.jsonl'} is missing: `hf-distill run RECIPE` writes it" in str(result.exception)
