"""The registry of losses. The keyword parameters of a loss function are options that a config or recipe may set."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from ..core.loss_kinds import CHUNKS, DISTRIBUTION, EMBEDDING, FEATURES, OUTPUTS, POOLINGS
from ..core.options import POSITIVE, option_problem, option_schema
from ..errors import DistillError, did_you_mean, raise_if_any

Limits: TypeAlias = Mapping[str, Mapping[str, object]]  # option -> keys of JSON Schema
FEATURE_OPTIONS = {"layers": "auto", "stack": None}  # of every loss on layers: layer mapping and stack
EMBEDDING_OPTIONS = {"pooling": "mean", "teacher_pooling": None}  # of losses on embeddings; None: as the student
_EMBEDDING_SCHEMAS = {
    "pooling": option_schema("mean", {"enum": [*POOLINGS]}),
    "teacher_pooling": option_schema(None, {"enum": [*POOLINGS, None]}),
}


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    name:               name in configs, recipes and logs
    function:           (student, teacher, targets, **options) -> [T]; divergences are in nats
    compares:           ("logits",), one kind of feature, one of `CHUNKS`, or () if it reads nothing of the teacher
    paper:              arXiv id
    options:            name -> default, from the function's signature
    gradient_fn:        analytic gradient, see `register_gradient`; None uses autograd
    sparse_gradient_fn: analytic gradient with a sparse teacher; None uses autograd
    project:            whether a projector maps the student's hidden states to the teacher's width first
    limits:             name -> range of an option, as keys of JSON Schema; see `core/options.py`
    outputs:            of a loss on logits or labels: one of `OUTPUTS`, what the outputs of the models are
    rows_together:      number of consecutive targets that the function reads together, from a multiple of it on
    """

    name: str
    function: Callable[..., Tensor]
    compares: tuple[str, ...]
    paper: str
    options: Mapping[str, object]
    gradient_fn: Callable[..., tuple[Tensor, Tensor]] | None = None
    sparse_gradient_fn: Callable[..., tuple[Tensor, Tensor]] | None = None
    project: bool = False
    limits: Limits = dataclasses.field(default_factory=dict)
    outputs: str = DISTRIBUTION
    rows_together: int = 1

    @property
    def option_schemas(self) -> dict[str, dict[str, object]]:
        """Name -> JSON Schema of each option, including the options that all losses on features have."""
        schemas = {name: option_schema(default, self.limits.get(name, {})) for name, default in self.options.items()}
        if self.feature == EMBEDDING:
            return schemas | _EMBEDDING_SCHEMAS
        # `objective` checks the options of layers.
        return schemas | ({name: {"default": value} for name, value in FEATURE_OPTIONS.items()} if self.feature else {})

    @property
    def feature(self) -> str | None:
        """Kind of feature that the loss compares; None for a loss on logits or labels."""
        return next((kind for kind in self.compares if kind in FEATURES), None)

    @property
    def compares_chunks(self) -> bool:
        """Whether the loss is for a teacher of another tokenizer."""
        return any(kind in CHUNKS for kind in self.compares)

    def fits(self, outputs: str) -> bool:
        """Whether the loss is defined for models with these outputs, one of `OUTPUTS`; losses on features fit all."""
        return self.feature is not None or self.outputs == outputs

    def check(self, options: Mapping[str, object]) -> None:
        """Check the names, types and ranges of options.

        Args:
            options: name -> value.

        Raises:
            DistillError: an option is unknown, has a wrong type or is out of range; the message names all problems.
        """
        schemas, problems = self.option_schemas, []
        for name, value in options.items():
            if name not in schemas:
                problems.append(f"Loss {self.name!r} has no option {name!r}{did_you_mean(name, schemas)}")
            elif problem := option_problem(name, value, schemas[name]):
                problems.append(f"Loss {self.name!r}: {problem}")
        raise_if_any(problems)


LOSSES: dict[str, Loss] = {}


def loss(
    name: str,
    compares: tuple[str, ...] = ("logits",),
    paper: str = "",
    project: bool = False,
    limits: Limits | None = None,
    outputs: str = DISTRIBUTION,
    rows_together: int = 1,
) -> Callable[[Callable], Callable]:
    """Register a loss: `@loss("my_kl", compares=("logits",), paper="1503.02531")`.

    The function takes `(student, teacher, targets, *, options...)` and returns one number for each target token, [T],
    neither masked nor weighted nor averaged. A parameter `temperature` gets the run's temperature T, and the objective
    multiplies the loss by T^2. `compares` decides what student and teacher are:

        ("logits",)     two `Signals`
        ()              two `Signals`; that of the teacher may be None
        ("hidden",)     two tensors [N, H_s] and [N, H_t], the outputs of a pair of layers; with `project`, the
                        student's is [N, H_t]
        ("attention",)  [N, h_s, S] and [N, h_t, S], rows of the attention maps
        ("values",)     [B, h_s, S, H_s / h_s] and [B, h_t, S, H_t / h_t], the attention's values
        ("embedding",)  [B, H_s] and [B, H_t], the pooled hidden states of each row; with `project`, the student's are
                        [B, H_t]
        ("chunk_log_probs",), ("first_logits",)     two `Signals`, of which the teacher's have `AlignedLogits`: of a
                        teacher with another tokenizer. The value of a chunk is that of its first token, and other
                        tokens have 0

    A loss on features returns [N], one number for each token of `targets`; its term is the mean over the pairs of
    layers; a loss on embeddings returns one number for each row. An option takes values of the type of its default.

    Args:
        name: name in configs, recipes and logs.
        compares: what the function reads of student and teacher.
        paper: arXiv id.
        project: whether a projector maps the student's hidden states to the teacher's width first.
        limits: ranges of options, such as `{"beta": {"minimum": 0}}`; configs and recipes are checked against them.
        outputs: what the outputs of the models are: "distribution" over ids or classes, or "bernoullis", one for each
            label of a multi-label classifier, or "real_values". Losses on features ignore it.
        rows_together: number of consecutive targets that the function compares with each other; the fused loss then
            calls it with a multiple of this number, counted from the first target of the batch.

    Returns:
        a decorator that returns the function unchanged.

    Raises:
        DistillError: the name is used already or no identifier, `compares` or `outputs` is unknown, or the
            function has `**kwargs`.
    """
    if not name.isidentifier():
        raise DistillError(
            f"A loss cannot have the name {name!r}: logs and modules use it, so give letters, digits and _ only, and "
            "no digit first."
        )
    kinds = ("logits", *FEATURES, *CHUNKS)
    if not set(compares) <= {*kinds} or len(compares) > 1:
        raise DistillError(
            f"Loss {name!r} has compares={compares}; give an empty tuple, or one of: {', '.join(kinds)}."
        )

    if outputs not in OUTPUTS:
        raise DistillError(f"Loss {name!r} has outputs={outputs!r}; give one of: {', '.join(OUTPUTS)}.")

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())[3:]
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise DistillError(
                f"Loss {name!r} takes **{parameters[-1].name}: write its options as named parameters, so that a "
                "misspelled option is an error."
            )
        if name in LOSSES and LOSSES[name].function.__qualname__ != function.__qualname__:
            raise DistillError(f"A loss with the name {name!r} is registered already: choose another name.")
        options = {p.name: p.default for p in parameters}
        ranges = {"temperature": POSITIVE, **(limits or {})}
        if unknown := ranges.keys() - options.keys() - {"temperature"}:
            raise DistillError(f"Loss {name!r} has limits for {', '.join(sorted(unknown))}, which it does not take.")
        LOSSES[name] = Loss(
            name,
            function,
            tuple(compares),
            paper,
            options,
            project=project,
            limits=ranges,
            outputs=outputs,
            rows_together=rows_together,
        )
        return function

    return register


def register_gradient(of: Callable, sparse: bool = False) -> Callable[[Callable], Callable]:
    """Register the analytic gradient of a registered loss, which the fused loss uses instead of autograd.

    The function takes `(block, **options)`, with the logits [r, V] of a `BlockLogits`, and returns the loss [r] and its
    gradient with respect to the student logits, [r, V], in a tensor that the caller may overwrite
    (`block.new_buffer()` returns one).

    Args:
        of: the registered loss function.
        sparse: whether it is for a sparse teacher, which is `block.sparse_teacher`.

    Returns:
        a decorator that returns the function unchanged.
    """

    def register(function: Callable) -> Callable:
        name = next(name for name, loss in LOSSES.items() if loss.function is of)
        if sparse:
            LOSSES[name] = dataclasses.replace(LOSSES[name], sparse_gradient_fn=function)
        else:
            LOSSES[name] = dataclasses.replace(LOSSES[name], gradient_fn=function)
        return function

    return register


def get_loss(name: str, argument: str = "", of_logits: bool = False) -> Loss:
    """Return a registered loss.

    Args:
        name: name of the loss.
        argument: the argument that has the name, for the message; "" if it is obvious.
        of_logits: whether the message suggests only losses that read the teacher's logits.

    Raises:
        DistillError: no loss has this name; the message suggests the closest one.
    """
    if name not in LOSSES:
        names = [known for known, loss in LOSSES.items() if not of_logits or "logits" in loss.compares]
        raise DistillError(f"{argument and argument + ': '}Unknown loss {name!r}{did_you_mean(name, names)}")
    return LOSSES[name]
