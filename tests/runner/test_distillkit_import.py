"""Data sets of DistillKit, which a naive encoder of the tests writes, are imported as the cache of a recipe."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError
from hf_distill.cache import open_cache
from hf_distill.cache.example_keys import batch_examples
from hf_distill.cache.serialization import decode_signals
from hf_distill.core.targets import Targets
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.cache_import import import_cache
from hf_distill.runner.cache_import.distillkit_codec import LegacyQuantization, Quantization
from hf_distill.runner.datasets import prepare_data
from hf_distill.runner.model_loading import load_pretrained, resolve_model

VOCAB = 258  # of the smoke models
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
K = 8
CONFIG = {"d": VOCAB, "k": K, "exact_k": 4, "exact_dtype": "float32", "polynomial_terms": [0, 1, "sqrt"]}
CONFIG |= {"term_dtype": "float32", "delta_encoding": False, "error_diffusion": False, "normalize_t": False}
CONFIG |= {"residual_bins": [{"scale_dtype": "float32", "element_bits": 12, "num_elements": 4}]}
LEGACY = {"vocab_size": VOCAB, "k": K, "exact_k": 4, "polynomial_degree": 3, "term_dtype": "float32"}


def float_bytes(values, dtype):
    return (
        list(torch.tensor([float(v) for v in values], dtype=DTYPES[dtype]).view(torch.uint8).tolist()) if values else []
    )


def bit_bytes(numbers, bits):
    """Write integers one after the other, and fill the last byte with zeros."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)]


def id_bits(vocab):
    return len(format(vocab - 1, "b"))


def term(name, t):
    return {"sqrt": t**0.5, "exp": np.exp(t)}[name] if isinstance(name, str) else t**name


def compress(log_probs, config):
    """Return the bytes of the log-probabilities of one position, most probable first."""
    values = [float(v) for v in log_probs]
    if config["delta_encoding"]:
        values = [values[0], *(after - before for before, after in pairwise(values))]
    exact, further = values[: config["exact_k"]], np.array(values[config["exact_k"] :])
    written, left = float_bytes(exact, config["exact_dtype"]), further
    if config["polynomial_terms"]:
        last = len(further) - 1 if config["normalize_t"] else 1
        table = np.array([[term(name, t / last) for name in config["polynomial_terms"]] for t in range(len(further))])
        fitted = torch.tensor(np.linalg.lstsq(table, further, rcond=None)[0], dtype=DTYPES[config["term_dtype"]])
        written += float_bytes(fitted.tolist(), config["term_dtype"])
        left = further - table @ fitted.double().numpy()
    start = 0
    for each in config["residual_bins"]:
        part, half = left[start : start + each["num_elements"]], 2 ** (each["element_bits"] - 1)
        scale = torch.tensor(np.abs(part).max() / half, dtype=DTYPES[each["scale_dtype"]])
        written += float_bytes([scale], each["scale_dtype"])
        numbers = [int(np.clip(round(v / scale.item()), -half, half - 1)) + half for v in part]
        if each["element_bits"] == 1:
            numbers = [int(v > 0) for v in part]
        written += bit_bytes(numbers, each["element_bits"])
        start += each["num_elements"]
    return written


def compress_legacy(ids, values, config):
    """Return the packed ids, the exact values and the coefficients of one position."""
    bits = id_bits(config["vocab_size"])
    per = 64 // bits
    packed = [sum(i << (bits * n) for n, i in enumerate(ids[at : at + per])) for at in range(0, len(ids), per)]
    exact, further = values[: config["exact_k"]], values[config["exact_k"] :]
    table = [[float(n) ** -e for e in range(config["polynomial_degree"] + 1)] for n in range(1, len(further) + 1)]
    return packed, list(exact), np.linalg.lstsq(np.array(table), np.array(further), rcond=None)[0].tolist()


@pytest.mark.parametrize("delta_encoding", [False, True])
@pytest.mark.parametrize("normalize_t", [False, True])
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"exact_k": 20, "residual_bins": [], "polynomial_terms": None}, 1e-5),
        ({"exact_dtype": "bfloat16"}, 0.6),
        ({"exact_k": 0, "polynomial_terms": None, "residual_bins": [[16, 12], [10, 8]]}, 1e-2),
        ({"polynomial_terms": [0, 1, 2, "sqrt"], "residual_bins": [[9, 6], [14, 5]]}, 0.4),
        ({"polynomial_terms": [0, "exp", -1], "normalize_t": None, "exact_k": 19}, 1e-2),
    ],
)
def test_compressed_log_probabilities_are_decoded(changes, tolerance, normalize_t, delta_encoding):
    config = CONFIG | {"k": 20, "d": 1000, "normalize_t": normalize_t, "delta_encoding": delta_encoding} | changes
    if config["normalize_t"] is None:  # one further value, at index 0
        config |= {"normalize_t": False, "polynomial_terms": [0, "exp"], "residual_bins": []}
    bins = [each if isinstance(each, dict) else None for each in config["residual_bins"]]
    if None in bins:
        names = ("element_bits", "num_elements")
        bins = [{"scale_dtype": "float32", **dict(zip(names, each, strict=True))} for each in config["residual_bins"]]
    config |= {"residual_bins": bins}
    generator = torch.Generator().manual_seed(0)
    log_probs, ids = (torch.randn(6, 1000, generator=generator) * 2).log_softmax(-1).topk(20)
    packed_ids = np.array([bit_bytes(row, id_bits(1000)) for row in ids.tolist()], dtype=np.uint8)
    packed = np.array([compress(row, config) for row in log_probs.tolist()], dtype=np.uint8)
    decoded_ids, decoded = Quantization(**config).decode(packed_ids, packed)
    assert decoded_ids.tolist() == ids.tolist()
    assert decoded == pytest.approx(log_probs.numpy(), abs=tolerance * (4 if delta_encoding else 1))
    exact = config["exact_k"]
    if config["exact_dtype"] == "float32":
        assert decoded[:, :exact] == pytest.approx(log_probs[:, :exact].numpy(), abs=1e-5)


def test_one_bit_residuals_are_added_or_subtracted():
    bins = [{"scale_dtype": "float16", "element_bits": 1, "num_elements": 3}]
    config = CONFIG | {"d": 16, "k": 4, "exact_k": 1, "polynomial_terms": [0], "residual_bins": bins}
    packed = [
        *float_bytes([-1.0], "float32"),
        *float_bytes([-5.0], "float32"),
        *float_bytes([0.5], "float16"),
        0b10100000,
    ]
    _, decoded = Quantization(**config).decode(np.zeros((1, 2), np.uint8), np.array([packed], dtype=np.uint8))
    assert decoded.tolist() == [[-1.0, -4.5, -5.5, -4.5]]


def test_legacy_log_probabilities_are_decoded():
    log_probs, ids = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)).log_softmax(-1).topk(K)
    config = LEGACY | {"vocab_size": 1000}
    pairs = zip(ids.tolist(), log_probs.tolist(), strict=True)
    columns = [np.array(column) for column in zip(*(compress_legacy(*pair, config) for pair in pairs), strict=True)]
    decoded_ids, decoded = LegacyQuantization(**config).decode(*columns)
    assert decoded_ids.tolist() == ids.tolist()
    assert decoded == pytest.approx(log_probs.numpy(), abs=1e-4)


def recipe(*overrides):
    fixed = ["data.task.path=rows.jsonl", "train.logging_steps=1", "distill.temperature=1", "teacher.path=c"]
    return load_recipe("cached", [*fixed, *overrides], smoke=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(resolve_model("smoke:llama/teacher"))


@pytest.fixture
def texts(tmp_path, monkeypatch, model):
    """(ids, top-k ids, log-probabilities) of each row of the recipe, at all of its positions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"prompt": f"What is {i}?", "completion": " It is " + "very " * (i % 3) + "big."} for i in range(10)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import_cache(recipe(), [], missing_file="needed.jsonl")
    found = []
    for line in Path("needed.jsonl").read_text().splitlines():
        ids = json.loads(line)["prompt_token_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([[*ids, 257]])).logits[0].float().log_softmax(-1)
        values, best = log_probs.topk(K)
        found.append(([*ids, 257], best.tolist(), values.tolist()))  # a token is added, as DistillKit does
    return found


def new_form(text):
    ids, best, values = text
    return {
        "input_ids": ids,
        "compressed_logprobs": [compress(row, CONFIG) for row in values[:-1]],
        "bytepacked_indices": [bit_bytes(row, id_bits(VOCAB)) for row in best[:-1]],
    }


def legacy_form(text, added=0.0):
    ids, best, values = text
    values = [[value + added for value in row] for row in values]
    triples = [compress_legacy(*pair, LEGACY) for pair in zip(best, values, strict=True)]
    names = ("packed_indices", "exact_values", "coeffs")
    return {"input_ids": ids, **dict(zip(names, map(list, zip(*triples, strict=True)), strict=True))}


def raw_form(text):
    ids, best, values = text
    return {"input_ids": ids, "token_ids": best[:-1], "top_values": values[:-1]}


def packed_form(texts):
    """One row with all texts, without the last token of each."""
    parts = [new_form(text) for text in texts]
    row = {name: [value for part in parts for value in part[name]] for name in list(parts[0])[1:]}
    ids = [token for text in texts for token in text[0][:-1]]
    mask = [number for number, text in enumerate(texts, 1) for _ in text[0][:-1]]
    return {
        "input_ids": [*ids, 0, 0],
        **{n: [*v, v[-1], v[-1]] for n, v in row.items()},
        "attention_mask": [*mask, 0, 0],
    }


TYPES = {
    "packed_indices": pa.uint64(),
    "exact_values": pa.float32(),
    "coeffs": pa.float32(),
    "top_values": pa.float32(),
}
TYPES |= {"compressed_logprobs": pa.uint8(), "bytepacked_indices": pa.uint8(), "token_ids": pa.int64()}


def save(rows, config=CONFIG, folder="data"):
    Path(folder).mkdir(exist_ok=True)
    columns = {
        name: pa.array([row[name] for row in rows], pa.list_(pa.list_(TYPES[name]) if name in TYPES else pa.uint64()))
        for name in rows[0]
    }
    pq.write_table(pa.table(columns), Path(folder) / "data_0.parquet")
    if config:
        Path(folder, "compression_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def check_cache(folder, model, tolerance):
    """Compare the cache with the model's log-probabilities."""
    cache, loaded = open_cache(folder), recipe()
    tokenizer = load_pretrained(AutoTokenizer, loaded.tokenizer_model)
    data = prepare_data(loaded, tokenizer, loaded.train.seed or 42, 1)
    for row in [*data.train, *data.held_out]:
        batch = data.collator([row])
        targets = Targets.from_batch(batch, True)
        stored = cache.get([example.key for example in batch_examples(batch, targets)])
        signals = decode_signals(stored, cache.manifest, {}, torch.device("cpu"), VOCAB).logits
        with torch.no_grad():
            log_probs = model(batch["input_ids"]).logits[0].float().log_softmax(-1)[targets.positions]
        assert torch.equal(signals.ids, log_probs.topk(K).indices.sort(-1).values)
        assert torch.allclose(signals.log_probs, log_probs.gather(-1, signals.ids), atol=tolerance)


@pytest.mark.parametrize("form", ["new", "legacy", "raw", "packed", "save_to_disk"])
def test_every_form_becomes_a_cache_from_which_a_student_trains(texts, model, form):
    config = None
    if form == "legacy":
        file = save([legacy_form(text) for text in texts], None)
        Path("run.yml").write_text(yaml.safe_dump({"teacher": {"kind": "dataset", "legacy_logit_compression": LEGACY}}))
        config = "run.yml"
    elif form == "raw":
        file = save([raw_form(text) for text in texts], None) + "/data_0.parquet"
    elif form == "save_to_disk":
        Dataset.from_list([new_form(text) for text in texts]).save_to_disk("disk")
        file, config = "disk", "config.yaml"
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    else:
        file = save([packed_form(texts)] if form == "packed" else [new_form(text) for text in texts])
    summary = import_cache(recipe(), [file], compression=config)
    assert summary.matches.records == 10
    imported = summary.manifest.teacher["imported"]
    assert imported["formats"] == ["distillkit"]
    assert (imported["details"][0]["compression"] or CONFIG)["k"] == K
    check_cache("c", model, 0.01 if form != "legacy" else 0.05)
    if form == "new":
        assert run_recipe(recipe("control=null")).models["student"]["perplexity"] > 1


def test_published_texts_become_the_data_of_a_recipe(texts, run_cli):
    save([packed_form(texts)])
    Path("rows.jsonl").unlink()
    written = run_cli("cache", "texts", "data", "--model", "smoke:llama/teacher", "-o", "rows.jsonl")
    assert "rows.jsonl: 10 texts" in written.stdout, written.stderr
    assert [json.loads(line)["input_ids"] for line in Path("rows.jsonl").read_text().splitlines()] == [
        text[0][:-1] for text in texts
    ]
    settings = [value for each in ("distill.temperature=1", "data.task.path=rows.jsonl") for value in ("--set", each)]
    done = run_cli("cache", "import", "data", "--recipe", "cached", "--smoke", *settings, "-o", "c")
    assert done.returncode == 0, done.stderr
    assert "10 records: 0 of other texts, 0 duplicates" in done.stdout
    assert run_recipe(recipe("control=null")).models["student"]["perplexity"] > 1


def test_probabilities_that_sum_to_more_than_one_by_approximation_are_normalized(texts):
    values = texts[0][2]
    total = sum(np.exp(values[10]))
    values[10] = [value - np.log(total) + 0.1 for value in values[10]]
    summary = import_cache(recipe(), [save([raw_form(text) for text in texts], None)])
    assert summary.matches.normalized == 1
    assert summary.manifest.teacher["imported"]["normalized_positions"] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda texts: save([legacy_form(text, added=9.0) for text in texts], LEGACY), "not logits"),
        (lambda texts: save([new_form(text) for text in texts], None), "compression_config.yaml does not exist"),
        (lambda texts: save([new_form(text) for text in texts], CONFIG | {"k": 9}), "is it the compression with which"),
        (lambda texts: save([new_form(text) for text in texts], CONFIG | {"exact_k": 1}), "describes|needs more"),
        (lambda texts: save([new_form(text) for text in texts], {"d": 9}), "is no `logprob_compressor`.*k: Field requ"),
        (lambda texts: save([{"input_ids": text[0]} for text in texts]), "has the columns input_ids"),
        (lambda texts: [save([raw_form(texts[0])]), Path("data/b.parquet").write_text("x")][0], "cannot be read as"),
        (
            lambda texts: [save([raw_form(texts[0])]), pq.write_table(pa.table({"a": [1]}), "data/b.parquet")][0],
            "data cann",
        ),
        (lambda texts: save([new_form((text[0][:-3], *text[1:])) for text in texts]), "row 0 .* A row needs as many"),
        (lambda texts: save([raw_form((text[0], [[999] * K] * len(text[1]), text[2])) for text in texts]), "id 999"),
        (lambda texts: save([new_form(text) for text in texts], CONFIG | {"exact_k": 9}), "exact_k is at most k"),
        (lambda texts: save([new_form(text) for text in texts], CONFIG | {"exact_k": 5}), "more elements than"),
        (lambda texts: save([legacy_form(text) for text in texts], LEGACY | {"k": 10**9}), "the configuration needs"),
        (
            lambda texts: save(
                [new_form(text) | {"bytepacked_indices": [None] * (len(text[0]) - 1)} for text in texts]
            ),
            "row 0 .* has null in bytepacked_indices",
        ),
        (lambda texts: save([raw_form((text[0], [[9] * K] * len(text[1]), text[2])) for text in texts]), "an id twice"),
    ],
)
def test_other_data_is_refused_with_its_row_and_nothing_is_written(texts, make, message):
    with pytest.raises(DistillError, match=message):
        import_cache(recipe(), [make(texts)])
    assert not Path("c").exists()
