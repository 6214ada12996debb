"""Losses on hidden states with a teacher behind `hf-distill serve` are those of the local teacher."""

import pytest
import torch
from servers.hidden_server import HiddenServer
from tiny import VOCAB, build, collate, one_step, rows
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, OPTConfig

from hf_distill import DistillError
from hf_distill.cache import write_cache
from hf_distill.core.signals import FeatureKey
from hf_distill.core.targets import Targets
from hf_distill.data import Collator
from hf_distill.errors import RunError
from hf_distill.teachers import FrozenTeacher, MultiTeacher, RemoteTeacher
from hf_distill.teachers.remote import hidden, wire
from hf_distill.teachers.remote.api import TokenRow

LOSSES = [
    {"name": "hidden_mse", "weight": 0.1, "layers": "stretch"},
    {"name": "hidden_cosine", "layers": [[1, 0], [1, 1]]},
    {"name": "hidden_relation", "layers": "last:1"},
    {"name": "hidden_mse", "weight": 0.1, "layers": "learned"},
]


def big(seed=1, kind="llama"):
    return build(kind, seed, layers=3, width=48)


@pytest.fixture
def start(tmp_path):
    """`start(model)`: a running server; it is stopped after the test."""
    running = []

    def start(model=None, **options):
        folder = tmp_path / f"server-{len(running)}"
        running.append(HiddenServer(big() if model is None else model, folder, **options).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def remote(server, **options):
    return RemoteTeacher(server.url, api="hidden", **{"retry_seconds": 0.3} | options)


def packed_rows():
    """Rows of three documents without padding."""
    documents = [{name: row[name][row["attention_mask"] > 0].tolist() for name in row} for row in rows("llama", 24)]
    parts = [documents[i : i + 3] for i in range(0, 24, 3)]
    return [
        {name: [token for each in part for token in each[name]] for name in ("input_ids", "labels")}
        | {"seq_lengths": [len(each["input_ids"]) for each in part]}
        for part in parts
    ]


def rows_with_teacher_prompt():
    """Rows before whose tokens the teacher reads five more."""
    data = rows("llama", 32)
    for row in data:
        length = len(row["input_ids"])
        row["teacher_input_ids"] = torch.cat([torch.arange(40, 45), row["input_ids"]])
        row["teacher_attention_mask"] = torch.cat([torch.ones(5, dtype=torch.long), row["attention_mask"]])
        row["teacher_labels"] = torch.cat([torch.full((6,), -100), row["labels"][1:]])
        assert len(row["teacher_labels"]) == length + 5
    return data


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {}),
        ("llama", {"train_dataset": rows("llama", 32, pad="left")}),
        ("llama", {"train_dataset": packed_rows(), "data_collator": Collator(0), "remove_unused_columns": False}),
        ("llama", {"train_dataset": rows_with_teacher_prompt(), "remove_unused_columns": False}),
    ],
)
def test_loss_and_gradients_are_those_of_the_local_teacher(make_trainer, start, kind, options):
    options = {"temperature": 2.0, "losses": [{"name": "forward_kl"}, *LOSSES]} | options
    local = one_step(make_trainer, kind, 2, 2, teacher=big(kind=kind), **options)
    served = one_step(make_trainer, kind, 2, 2, teacher=remote(start(big(kind=kind))), **options)
    for name in ("loss", "hidden_mse_loss", "hidden_cosine_loss", "hidden_relation_loss", "hidden_mse_2_loss"):
        assert local[0][name] == pytest.approx(served[0][name], rel=1e-6), name
    assert any("projectors" in name for name in local[1])
    for name, gradient in local[1].items():
        assert_close(served[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_batches_are_requested_ahead_with_the_layers_that_the_step_needs(make_trainer, start):
    server = start()
    options = dict(max_steps=3, gradient_accumulation_steps=2, losses=LOSSES[:1], eval_strategy="no")
    make_trainer(teacher=remote(server, prefetch=2), **options).train()
    assert sum(server.batches) == 3 * 2 * 4  # no row is requested twice
    assert server.requested_layers == {(0, 2)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_rounded_to_the_dtype_only(start, dtype):
    batch = collate(rows("llama", 4))
    targets = Targets.from_batch(batch, True)
    requests = {FeatureKey("hidden", layer, teacher="t"): targets.feature_tokens(batch, True) for layer in (2, 0)}
    teacher, local = remote(start(), dtype=dtype), FrozenTeacher(big())
    for each in (teacher, local):
        each.prepare(build("llama", 0), torch.device("cpu"))
    served, reference = (each(batch, targets, requests).features for each in (teacher, local))
    assert {*served} == {*requests}
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    for key, feature in reference.items():
        assert_close(served[key], feature, atol=tolerance, rtol=tolerance)
    batch["labels"][:] = -100
    no_targets = Targets.from_batch(batch, True)
    empty = teacher(batch, no_targets, dict.fromkeys(requests, no_targets)).features
    assert {tuple(feature.shape) for feature in empty.values()} == {(0, 48)}


def test_blocks_may_be_wider_than_the_input_of_the_output_head(start, make_trainer, tmp_path):
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=48, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    options = dict(max_steps=1, losses=[{"name": "forward_kl"}, {"name": "hidden_mse"}])
    server, logs = start(model), []
    assert (server.teacher.info.width, server.teacher.info.layer_width) == (32, 48)
    for teacher in (FrozenTeacher(model), remote(server)):
        trainer = make_trainer(teacher=teacher, **options)
        trainer.train()
        logs.append([trainer.state.log_history[0][name] for name in ("loss", "hidden_mse_loss")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    with pytest.raises(DistillError, match="width 48, its last hidden states have width 32"):
        write_cache(tmp_path / "cache", model, rows("llama", 4), collator=collate, kind="hidden", layers=[1])
    assert not (tmp_path / "cache").exists()


def test_a_loss_on_features_names_one_of_several_teachers(make_trainer, start):
    options = dict(max_steps=2, losses=[{"name": "forward_kl"}, {"name": "hidden_mse", "teacher": "b"}])
    logs = []
    for teachers in ((remote(start()), remote(start(big(2)))), (FrozenTeacher(big()), FrozenTeacher(big(2)))):
        trainer = make_trainer(teacher=MultiTeacher(dict(zip("ab", teachers, strict=True))), **options)
        trainer.train()
        logs.append([log["hidden_mse_loss"] for log in trainer.state.log_history if "hidden_mse_loss" in log])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


# Requests


def test_rows_of_other_layers_are_other_requests_and_large_answers_are_split(start, monkeypatch):
    server = start()
    protocol = remote(server).protocol
    protocol.check()
    requested = [TokenRow((3, 4, 5, 6), (1, 3), layers) for layers in ((), (), (1,), (0, 2), (0, 2))]
    expected = server.teacher.compute_rows(requested)
    assert_close(protocol.request_rows(requested), expected, atol=1e-5, rtol=1e-5)
    assert [*expected[3]] == ["hidden_states", "layer_0", "layer_2"]
    answered = dict(path=wire.HIDDEN_STATES, status="200")
    assert server.metrics.total("requests_total", **answered) == 3
    monkeypatch.setattr(hidden, "MAX_ANSWER_BYTES", 2 * 48 * 4 * 4)  # of a row with two layers: 2 * 3 * 48 * 4
    assert_close(protocol.request_rows(requested), expected, atol=1e-5, rtol=1e-5)
    assert server.metrics.total("requests_total", **answered) == 3 + 4


def corrupt(body):
    """One bit of the last number."""
    return body[:-2] + bytes([body[-2] ^ 1]) + body[-1:]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda body: body[: len(body) - 48 * 4], "truncated"),
        (corrupt, "checksum"),
        (lambda body: body + b"\0", "truncated"),
    ],
)
def test_a_changed_answer_is_requested_again_and_then_refused(start, monkeypatch, change, text):
    server = start()
    protocol = remote(server, retry_seconds=30).protocol
    protocol.check()
    encode, changes = wire.encode_hidden_states, [change]
    monkeypatch.setattr(
        wire, "encode_hidden_states", lambda *given: (changes.pop() if changes else bytes)(encode(*given))
    )
    row = TokenRow((3, 4, 5), (1, 2), (0, 1))
    (answer,) = protocol.request_rows([row])
    assert_close(answer, server.teacher.compute_rows([row])[0])
    changes += [change] * 9
    protocol.pool.retry_seconds = 0
    with pytest.raises(RunError, match=text):
        protocol.request_rows([row])


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "requested were"),
        ({"layer_1": torch.zeros(2, 48)}, "requested were"),
        ({"layer_0": torch.zeros(2, 48), "layer_1": torch.zeros(2, 48)}, "requested were"),
        ({"layer_0": torch.zeros(1, 48)}, "layer_0 has shape"),
        ({"layer_0": torch.zeros(2, 47)}, "layer_0 has shape"),
        ({"layer_0": torch.zeros(2, 48, dtype=torch.bfloat16)}, "layer_0 has shape"),
        ({"layer_0": torch.full((2, 48), torch.nan)}, "layer_0 is not finite"),
    ],
)
def test_an_answer_to_another_request_is_refused(start, tensors, text):
    info = start().teacher.info
    body = wire._pack({"hidden_states": torch.zeros(2, 48)} | tensors, {"weights": info.weights, "head": info.head})
    with pytest.raises(wire.WireError, match=text):
        wire.decode_hidden_states(body, [TokenRow((3, 4, 5), (1, 2), (0,))], "float32", info)


# Checks before training


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ({"name": "attention_kl"}, "returns hidden states only: use a loss on them"),
        ({"name": "value_relation"}, "returns hidden states only: use a loss on them"),
        ({"name": "hidden_mse", "layers": [[0, 3]]}, "teacher"),
    ],
)
def test_features_that_the_server_lacks_are_refused_before_training(start, make_trainer, loss, text):
    server = start()
    with pytest.raises(DistillError, match=text):
        make_trainer(teacher=remote(server), losses=[{"name": "forward_kl"}, loss])
    assert not server.batches
    protocol = remote(server).protocol
    protocol.check()
    with pytest.raises(DistillError, match="those of 3 layers"):
        protocol.request_rows([TokenRow((3, 4), (0,), (3,))])
    with pytest.raises(RunError, match="HTTP 400: the layer 3 is requested, and the teacher has layers 0 to 2"):
        protocol._request([TokenRow((3, 4), (0,), (3,))])


@pytest.mark.parametrize("reason", ["blocks are not found", "blocks return no tensor"])
def test_a_model_whose_blocks_cannot_be_read_is_served_for_losses_on_logits(start, make_trainer, monkeypatch, reason):
    import hf_distill.serving.teacher as serving

    if reason == "blocks are not found":
        monkeypatch.setattr(serving, "get_layer_stack", raise_no_blocks)
    else:
        monkeypatch.setattr("hf_distill.models.feature_capture.Tensor", dict)
    server = start()
    monkeypatch.undo()
    assert (server.teacher.info.depth, server.teacher.info.layer_width) == (0, 0)
    make_trainer(teacher=remote(server), max_steps=1).train()
    with pytest.raises(DistillError, match="could not read the outputs of the layers of its model"):
        make_trainer(teacher=remote(server), losses=[{"name": "forward_kl"}, {"name": "hidden_mse"}])


def raise_no_blocks(model):
    raise DistillError("no blocks")
