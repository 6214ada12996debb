"""Types of the records in the `results.json` of a run."""

from typing import TypeAlias, TypedDict

Metrics: TypeAlias = dict[str, float]


class ModelFacts(TypedDict, total=False):
    """Size of a model; what it consists of, if it was pruned; block influence of each of its layers.

    layers_kept: indices of the teacher's layers; with decoder_layers_kept and encoder_layers_kept of an encoder and a
                 decoder
    widths:      sizes of its width that were pruned, by their names in the config
    quantization: of a student that is served quantized
    """

    parameters: int
    layers: int
    layers_kept: list[int]
    decoder_layers_kept: list[int]
    encoder_layers_kept: list[int]
    widths: dict[str, int]
    block_influence: list[float]
    quantization: str


class DataFacts(TypedDict, total=False):
    """Numbers of rows, their SHA-256, the names of the sources if there are several, and those of the classes."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float
    train_fingerprint: str
    eval_fingerprint: str
    sources: list[str]
    labels: list[str]


class Provenance(TypedDict, total=False):
    """Name of a model or dataset that was read, with its commit on the Hub or the version of its package."""

    model: str
    dataset: str
    revision: str
    version: str


class ServerFacts(TypedDict, total=False):
    """The answers of a remote teacher: id of the served model, hosts without credentials, API and its options.

    `revision`, `quantization`, `dtype` of the hidden states and the fingerprint `weights` are those of `hf-distill
    serve`.
    """

    model: str | None
    hosts: list[str]
    api: str
    top_k: int
    revision: str
    quantization: str
    dtype: str
    weights: str


class StageFacts(TypedDict):
    """A stage of progressive distillation: its models, and the metrics of its student before and after."""

    stage: str
    teacher: str
    student: ModelFacts
    steps: int
    train_seconds: float
    before: Metrics
    after: Metrics


class Results(TypedDict, total=False):
    """The content of `results.json`. `models` holds the held-out metrics of each model, `steps` those of training."""

    status: str
    models: dict[str, Metrics]
    steps: dict[str, int]
    log_lines: dict[str, int]
    chain: list[StageFacts]
    environment: dict[str, str | int | None]
    data: DataFacts
    student: ModelFacts
    teacher: ModelFacts
    caches: dict[str, dict]
    servers: dict[str, ServerFacts]
    provenance: dict[str, Provenance]
    origin: str
