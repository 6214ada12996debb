"""Model files that request code, pickles or local files are refused before anything is loaded."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError
from hf_distill.hub import check_model
from hf_distill.recipe import load_recipe
from hf_distill.recipe.downloads import check_downloads, downloads
from hf_distill.runner.model_loading import LoadPolicy, load_policy, load_pretrained, resolve_model


@pytest.fixture(scope="session")
def model_bytes():
    """Files of a tiny model, as bytes by file name."""
    return {path.name: path.read_bytes() for path in Path(resolve_model("smoke:llama/teacher")).iterdir()}


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smoke:llama/teacher"))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def with_keys(content: bytes, **values) -> bytes:
    return json.dumps(json.loads(content) | values).encode()


class FileCreatingPickle:
    """A pickle that creates a file when it is loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


CONFIGS = {
    "a kernel": {"attn_implementation": "evil/kernel"},
    "a private kernel": {"_attn_implementation": "evil/kernel@main:run"},
    "a paged kernel": {"_attn_implementation": "paged|evil/kernel"},
    "an internal kernel": {"_attn_implementation_internal": "evil/kernel"},
    "a kernel for a part": {"attn_implementation": {"text_config": "evil/kernel"}},
    "a kernel of a part": {"text_config": {"_attn_implementation": "evil/kernel"}},
    "a kernel in a list": {"parts": [{"deep": {"attn_implementation": "evil/kernel"}}]},
    "a list of kernels": {"attn_implementation": ["evil/kernel"]},
    "a kernel of experts": {"_experts_implementation": "sonicmoe"},
    "pickled weights": {"transformers_weights": "adapter_model.bin"},
    "weights elsewhere": {"transformers_weights": "../../other/model.safetensors"},
    "another repository": {"vision": {"backbone": "evil/model", "use_pretrained_backbone": True}},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_is_refused_that_requests(hub, model_bytes, what):
    files = model_bytes | {"config.json": with_keys(model_bytes["config.json"], **CONFIGS[what])}
    hub.put("models", "org/model", files)
    for kind in (AutoTokenizer, AutoModelForCausalLM):
        with pytest.raises(DistillError, match=r"org/model: config\.json: "):
            load_pretrained(kind, "org/model")
    assert not any("evil" in path or ("safetensors" in path and "index" not in path) for _, path in hub.requests)


def test_a_config_with_values_of_transformers_is_loaded(hub, model_bytes):
    ask = {"_attn_implementation": "sdpa", "attn_implementation": None, "use_pretrained_backbone": False}
    hub.put("models", "org/model", model_bytes | {"config.json": with_keys(model_bytes["config.json"], **ask)})
    assert load_pretrained(AutoModelForCausalLM, "org/model").config._attn_implementation == "sdpa"


def test_a_local_folder_is_checked_and_remote_code_can_be_allowed(model_bytes, tmp_path):
    for name, content in (
        model_bytes | {"config.json": with_keys(model_bytes["config.json"], attn_implementation="a/b")}
    ).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DistillError, match="--trust-remote-code"):
        load_pretrained(AutoModelForCausalLM, str(tmp_path))
    check_model(str(tmp_path), remote_code=True)


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../other/model.safetensors", "/etc/x.safetensors", 5])
def test_a_shard_index_names_only_safetensors_of_the_same_repository(hub, model_bytes, shard):
    index = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": shard}}).encode()
    files = {name: content for name, content in model_bytes.items() if name != "model.safetensors"}
    hub.put("models", "org/model", files | {"model.safetensors.index.json": index, "pytorch_model.bin": b"x"})
    with pytest.raises(DistillError, match="no safetensors file"):
        load_pretrained(AutoModelForCausalLM, "org/model")


def test_an_adapter_is_loaded_on_the_base_model(hub, model_bytes, adapter):
    hub.put("models", "org/base", model_bytes)
    hub.put("models", "org/adapter", adapter | {"adapter_config.json": with_base(adapter, "org/base")})
    model = load_pretrained(AutoModelForCausalLM, "org/adapter")
    weights = load_file(write_adapter_weights(hub, adapter))
    name = next(name for name in weights if "lora_A" in name)
    parameters = dict(model.named_parameters())
    assert torch.equal(next(p for n, p in parameters.items() if "layers.0" in n and "lora_A" in n), weights[name])


def with_base(adapter, base) -> bytes:
    return with_keys(adapter["adapter_config.json"], base_model_name_or_path=base)


def write_adapter_weights(hub, adapter) -> str:
    Path("adapter.safetensors").write_bytes(adapter["adapter_model.safetensors"])
    return "adapter.safetensors"


@pytest.fixture(autouse=True)
def empty_working_dir(monkeypatch, tmp_path):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.mark.parametrize("base", ["here", "./here", "/srv/model", "~/model", "../x", "", None, 7, ["a/b"]])
def test_an_adapter_from_the_hub_cannot_name_a_local_folder_as_base(hub, model_bytes, adapter, base):
    Path("here").mkdir()
    for name, content in model_bytes.items():
        Path("here", name).write_bytes(content)
    hub.put("models", "org/adapter", adapter | {"adapter_config.json": with_base(adapter, base)})
    with pytest.raises(DistillError, match="base_model_name_or_path"):
        load_pretrained(AutoModelForCausalLM, "org/adapter")
    with pytest.raises(DistillError, match="base_model_name_or_path"):
        downloads(load_recipe("quickstart", ["teacher.model=org/adapter"]))


def test_the_base_of_an_adapter_is_listed_and_checked(hub, model_bytes, adapter):
    kernel = with_keys(model_bytes["config.json"], attn_implementation="evil/kernel")
    hub.put("models", "org/base", model_bytes | {"config.json": kernel})
    hub.put("models", "org/adapter", adapter | {"adapter_config.json": with_base(adapter, "org/base")})
    with pytest.raises(DistillError, match=r"org/base, the base of org/adapter: .*evil/kernel"):
        load_pretrained(AutoModelForCausalLM, "org/adapter")
    by_repo = {one.repo: one for one in downloads(load_recipe("quickstart", ["teacher.model=org/adapter"]))}
    assert by_repo["org/base"].used_for == ("base of org/adapter",)
    assert by_repo["org/base"].revision == hub.repos["models", "org/base"].at("main")
    hub.put("models", "org/base", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(DistillError, match="org/base: the weights are pickled"):
        check_downloads(downloads(load_recipe("quickstart", ["teacher.model=org/adapter"])))


@pytest.mark.parametrize("full", [False, True], ids=["adapter alone", "with a full model in safetensors"])
def test_a_pickled_adapter_is_not_read_without_permission(hub, model_bytes, adapter, full):
    hub.put("models", "org/base", model_bytes)
    files = {
        "adapter_config.json": with_base(adapter, "org/base"),
        "adapter_model.bin": pickle.dumps(FileCreatingPickle()),
    }
    hub.put("models", "org/adapter", files | (model_bytes if full else {}))
    with pytest.raises(DistillError, match="--allow-pickles"):
        load_pretrained(AutoModelForCausalLM, "org/adapter")
    assert not any(path.endswith("adapter_model.bin") for _, path in hub.requests)
    with pytest.raises(DistillError, match="org/adapter: the weights are pickled"):
        check_downloads(downloads(load_recipe("quickstart", ["teacher.model=org/adapter"])))
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"corda_config": {"cache_file": "/etc/passwd"}},
        {"megatron_config": {"a": 1}},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
        {"prompt_tuning_init_state_dict_path": "x.bin"},
    ],
)
def test_an_adapter_config_that_names_files_or_modules_is_refused(hub, model_bytes, adapter, values):
    hub.put("models", "org/base", model_bytes)
    config = with_keys(with_base(adapter, "org/base"), **values)
    hub.put("models", "org/adapter", adapter | {"adapter_config.json": config})
    with pytest.raises(DistillError, match="may name no files"):
        load_pretrained(AutoModelForCausalLM, "org/adapter")


def test_the_loaded_commit_is_the_checked_commit(hub: Hub, model_bytes, monkeypatch):
    hub.put("models", "org/model", model_bytes)
    check = check_model

    def check_then_push(*args, **kwargs):
        files = check(*args, **kwargs)
        hub.put(
            "models",
            "org/model",
            model_bytes | {"config.json": with_keys(model_bytes["config.json"], attn_implementation="a/b")},
        )
        return files

    monkeypatch.setattr("hf_distill.runner.model_loading.check_model", check_then_push)
    assert load_pretrained(AutoModelForCausalLM, "org/model").config._attn_implementation == "sdpa"


def test_a_tokenizer_config_that_names_a_local_file_is_refused(hub, model_bytes):
    Path("secret.json").write_text("{}")
    secret_path = str(Path("secret.json").resolve())
    config = with_keys(model_bytes["tokenizer_config.json"], tokenizer_file=secret_path)
    hub.put("models", "org/model", model_bytes | {"tokenizer_config.json": config})
    with pytest.raises(DistillError, match="a file on this machine"):
        load_pretrained(AutoTokenizer, "org/model")
    elsewhere = with_keys(model_bytes["tokenizer_config.json"], tokenizer_file="/home/author/tokenizer.json")
    hub.put("models", "org/model", model_bytes | {"tokenizer_config.json": elsewhere})
    assert load_pretrained(AutoTokenizer, "org/model")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_values(**values):
    return lambda content: with_keys(content, **values)


MALFORMED = {
    "config.json": [
        *(b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"model_type": 5}', b'{"model_type": "no-such"}', b'{"auto_map": 5}'),
        *(with_values(hidden_size="wide"), with_values(num_attention_heads=0), with_values(vocab_size=-3)),
        *(with_values(quantization_config=5), with_values(quantization_config={"quant_method": "aqlm"})),
        with_values(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"),
    ],
    "tokenizer.json": [b"", b"{", b"[]", b"\xff", cut, with_values(model={"type": "BPE"}), with_values(model=5)],
    "tokenizer_config.json": [b"{", b"[]", with_values(tokenizer_class=5)],
    "model.safetensors": [b"", b"x" * 100, cut],
}
CASES = [(name, i) for name, contents in MALFORMED.items() for i in range(len(contents))]


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{n}-{i}" for n, i in CASES])
def test_a_malformed_file_raises_a_one_line_error(hub, model_bytes, name, number):
    content = MALFORMED[name][number]
    hub.put("models", "org/model", model_bytes | {name: content(model_bytes[name]) if callable(content) else content})
    with pytest.raises(DistillError, match="org/model") as caught:
        [load_pretrained(kind, "org/model") for kind in (AutoTokenizer, AutoModelForCausalLM)]
    assert "\n" not in str(caught.value)


def test_a_malformed_adapter_raises_a_one_line_error(hub, model_bytes, adapter, tmp_path):
    hub.put("models", "org/base", model_bytes)
    config = with_base(adapter, "org/base")
    other = tmp_path / "other.safetensors"
    save_file({name: t[:1].contiguous() for name, t in load_file(write_adapter_weights(hub, adapter)).items()}, other)
    changes = [
        {"adapter_config.json": b"{"},
        {"adapter_config.json": with_keys(config, peft_type="NONE")},
        {"adapter_config.json": with_keys(config, peft_type=None)},
        {"adapter_config.json": with_keys(config, target_modules=["no_such"])},
        {"adapter_config.json": with_keys(config, r="many")},
        {"adapter_model.safetensors": b"x" * 50},
        {"adapter_model.safetensors": other.read_bytes()},
    ]
    for change in changes:
        hub.put("models", "org/adapter", adapter | {"adapter_config.json": config} | change)
        with pytest.raises(DistillError) as caught:
            load_pretrained(AutoModelForCausalLM, "org/adapter")
        assert "\n" not in str(caught.value), change
        assert "org/adapter" in str(caught.value)


def test_pickles_are_loaded_where_the_user_allows_them(hub, model_bytes, adapter):
    hub.put("models", "org/base", model_bytes)
    torch.save(load_file(write_adapter_weights(hub, adapter)), "adapter.bin")
    files = {
        "adapter_config.json": with_base(adapter, "org/base"),
        "adapter_model.bin": Path("adapter.bin").read_bytes(),
    }
    hub.put("models", "org/adapter", files)
    with load_policy(LoadPolicy(pickles=True)):
        assert load_pretrained(AutoModelForCausalLM, "org/adapter")


@pytest.fixture
def unreachable(monkeypatch):
    """Make the Hub unreachable when the fixture is called; it returns the list of the files that it is asked for."""

    def disconnect() -> list[str]:
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        asked = list[str]()

        def download(name: str, file: str, local_files_only: bool, **options) -> str:
            asked.extend([] if local_files_only else [file])
            return hf_hub_download(name, file, local_files_only=local_files_only, **options)

        monkeypatch.setattr(sys.modules["hf_distill.hub.model_files"], "hf_hub_download", download)
        return asked

    return disconnect


def test_an_unreachable_hub_is_asked_for_one_file_of_a_model_that_is_not_in_the_cache(hub, unreachable):
    """Each question is repeated for half a minute, and the Hub would be asked for every file."""
    hub.put("models", "o/model", {"config.json": b"{}"})
    asked = unreachable()
    with pytest.raises(DistillError, match=r"no file of the model repository 'o/model'.* write \./o/model"):
        check_model("o/model")
    assert asked == ["config.json"]


def test_an_unreachable_hub_is_asked_for_one_missing_file_of_a_model_in_the_cache(hub, unreachable):
    hub.put("models", "o/model", {"config.json": b"{}", "tokenizer_config.json": b'{"a": 1}'})
    files = check_model("o/model")
    asked = unreachable()
    assert check_model("o/model") == files
    assert asked == ["config.json", "adapter_config.json"]
