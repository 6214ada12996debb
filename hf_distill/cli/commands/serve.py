"""The `serve` command: a frozen teacher behind HTTP."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...core.defaults import SERVE_BATCH_TOKENS, SERVE_HOST, SERVE_PORT, SERVE_QUEUED_TOKENS
from ...errors import DistillError, require_package
from ..app import AllowPickles, Overrides, Smoke, TrustRemoteCode, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads

if TYPE_CHECKING:
    from ...recipe.models import TeacherSpec
    from ...teachers.remote.wire import TeacherInfo


@app.command()
def serve(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe with a frozen teacher, or a model: path, id on the Hub, or package:module/file.gguf.",
        ),
    ],
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any other than this machine needs HF_DISTILL_SERVE_TOKEN.")
    ] = SERVE_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = SERVE_PORT,
    quantization: Annotated[str | None, typer.Option(help="Quantize the weights: nf4 or int8.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, or auto: that of the checkpoint (default).")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over devices: auto, or a JSON object of modules and devices.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of an id.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="Attention implementation, such as sdpa.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Name of the teacher, if the recipe has several.")] = None,
    max_batch_tokens: Annotated[
        int,
        typer.Option(min=2, help="Largest number of tokens of a forward and of a request; rows cannot be longer."),
    ] = SERVE_BATCH_TOKENS,
    max_queued_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that may wait; further requests get HTTP 503.")
    ] = SERVE_QUEUED_TOKENS,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
    smoke: Smoke = False,
    yes: Yes = False,
) -> None:
    """Serve a frozen teacher to students on other machines (`api: hidden` of a remote teacher)."""
    for package in ("uvicorn", "starlette"):
        require_package(package, "serve", "hf-distill serve")
    options = {
        "quantization": quantization,
        "dtype": dtype,
        "device_map": _parse_device_map(device_map),
        "revision": revision,
        "attn_implementation": attn_implementation,
    }
    spec = _choose(reference, overrides or [], teacher, options, smoke, yes)
    from ...runner.model_loading import LoadPolicy, load_policy
    from ...serving.server import bind, read_token, url_of
    from ...serving.server import serve as serve_teacher
    from ...serving.teacher import load_served_teacher

    token = read_token(host)
    disable_library_progress_bars()
    with bind(host, port) as bound, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        _print(f"Loading {spec.model}")
        served = load_served_teacher(spec, max_batch_tokens)
        metrics = serve_teacher(
            served,
            bound,
            token=token,
            max_queued_tokens=max_queued_tokens,
            on_start=lambda: _print_start(served.info, url_of(bound), token is not None),
            on_stop=lambda: _print("Stopping: accepted requests are finished first. Ctrl-C ends the server at once."),
        )
    answered = metrics.total("requests_total", path="/hidden_states", status="200")
    _print(f"Stopped. Answered requests: {answered:,.0f}; target tokens: {metrics.total('target_tokens_total'):,.0f}.")


def _choose(
    reference: str, overrides: list[str], teacher: str | None, options: dict[str, Any], smoke: bool, yes: bool
) -> "TeacherSpec":
    """Return the teacher to load."""
    from ...serving.model_choice import is_recipe, spec_of_model, spec_of_recipe

    if is_recipe(reference):
        from ...recipe.load import load_recipe

        loaded = load_recipe(reference, overrides, smoke=smoke)
        confirm_downloads(reference, loaded, yes)
        return spec_of_recipe(loaded, teacher, options)
    if overrides or teacher or smoke:
        raise DistillError(
            f"{reference} is a model, and KEY=VALUE, --teacher and --smoke are for recipes: remove them. The path of a "
            "recipe ends in .yaml; `hf-distill recipes list` shows the packaged ones."
        )
    return spec_of_model(reference, options)


def _parse_device_map(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise DistillError(
            f"--device-map is no JSON object ({error}): give auto, or for example '{{\"\": 0}}'."
        ) from None


def _print(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False)


def _print_start(info: "TeacherInfo", url: str, has_token: bool) -> None:
    facts = [*([info.quantization] if info.quantization else []), info.dtype, f"{info.vocab_size:,} ids"]
    _print(f"{info.model} ({', '.join(facts)}) listens on {url} (Ctrl-C stops it)")
    _print(f"  rows of up to {info.context_length:,} tokens, {info.max_request_tokens:,} tokens in a request")
    commit = f", commit {info.revision[:12]}" if info.revision else ""
    _print(f"  output head {info.head[:12]}, weights {info.weights[:12]}{commit}")
    key = ", with the token in HF_DISTILL_TEACHER_API_KEY" if has_token else ""
    _print(f'  in a recipe: teacher: {{kind: remote, api: hidden, url: "{url}"}}{key}')
