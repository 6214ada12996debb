"""Shapes of a pruned student with a number of parameters: depth only, width only, and mixes of both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import lcm

from transformers import PretrainedConfig

from ..errors import DistillError
from ..planning.model_stats import ModelStats
from ..planning.pruned import parameters_of
from ..recipe.from_teacher import FromTeacher
from .successive_halving import Rung

_SMALLEST_SHARE = 0.25  # of a width: below it, a student has little in common with its teacher
_SCALES = 64  # a width is searched in so many steps
Sizes = dict[str, int]


@dataclass(frozen=True)
class ShapeCandidate:
    """A shape of a student, with its rungs so far.

    name:       which kind of shape it is, such as "depth" or "depth-mlp"
    sizes:      keys of `student.from_teacher` -> values
    parameters: number of parameters
    """

    name: str
    sizes: Sizes
    parameters: int
    rungs: list[Rung] = field(default_factory=list)


def shape_candidates(teacher: PretrainedConfig, budget: int, divisor: int = 1) -> list[ShapeCandidate]:
    """Return shapes with at most a number of parameters, as many as possible of each kind.

    depth:            fewer layers
    mlp:              fewer neurons
    experts:          fewer experts
    width:            fewer hidden channels and neurons, by the same factor
    width-heads:      the same, with fewer heads
    depth-mlp:        layers for half of the parameters that go, neurons for the other half
    depth-width:      the same with hidden channels and neurons

    Args:
        teacher: the config of the teacher.
        budget: number of parameters.
        divisor: what the widths of all linear layers must be a multiple of; see `QuantizationScheme`.

    Raises:
        DistillError: the teacher is not larger, or no shape is so small.
    """
    full = ModelStats.of(teacher).parameters
    if budget >= full:
        raise DistillError(
            f"target_parameters is {budget:,}, and the teacher has {full:,} parameters: give a smaller number."
        )
    maker = _ShapeMaker(teacher, divisor)
    candidates: list[ShapeCandidate] = []
    for name, make in maker.kinds(full, budget).items():
        try:
            sizes = make(budget)
        except DistillError:  # the teacher has no such units
            continue
        if sizes is not None and sizes not in [candidate.sizes for candidate in candidates]:
            candidates.append(ShapeCandidate(name, sizes, maker.count(sizes)))
    if not candidates:
        raise DistillError(
            f"target_parameters is {budget:,}, and no shape of this teacher ({full:,} parameters) is so small: the "
            "embeddings and a quarter of the widths have more. Give a larger number, or set sizes and vocab in "
            "place of target_parameters, which keeps all tokens."
        )
    return candidates


class _ShapeMaker:
    """Finds the largest shapes of one teacher within a number of parameters."""

    def __init__(self, teacher: PretrainedConfig, divisor: int):
        self.teacher, self.text, self.divisor = teacher, teacher.get_text_config(), divisor
        heads = self.text.num_attention_heads
        heads_per_group = heads // (getattr(self.text, "num_key_value_heads", None) or heads)
        head_dim = getattr(self.text, "head_dim", None) or self.text.hidden_size // heads
        self.head_step = lcm(heads_per_group * head_dim, divisor) // head_dim
        self._counts: dict[tuple, int] = {}

    def kinds(self, full: int, budget: int) -> dict[str, Callable[[int], Sizes | None]]:
        """Return the kinds of shapes; each returns its largest sizes within a budget, None if there are none."""
        neurons = "moe_intermediate_size" if getattr(self.text, "moe_intermediate_size", None) else "intermediate_size"
        widths = ("hidden_size", neurons)
        scaled: dict[str, tuple[tuple[str, ...], Sizes]] = {
            "mlp": ((neurons,), {}),
            "width": (widths, {}),
            "width-heads": ((*widths, "num_attention_heads"), {}),
            "experts": (("num_experts",), {}),
        }
        if (shallower := self._depth((full + budget) // 2)) is not None:
            scaled |= {"depth-mlp": ((neurons,), shallower), "depth-width": (widths, shallower)}
        kinds: dict[str, Callable[[int], Sizes | None]] = {"depth": self._depth}
        for kind, (names, fixed) in scaled.items():
            if all(getattr(self.text, name, None) for name in names):
                kinds[kind] = partial(self._scaled, names, fixed)
        return kinds

    def count(self, sizes: Sizes) -> int:
        """Count the parameters of a shape.

        Raises:
            DistillError: the teacher has no such units.
        """
        key = tuple(sorted(sizes.items()))
        if key not in self._counts:
            self._counts[key] = parameters_of(FromTeacher.model_validate(sizes), self.teacher)
        return self._counts[key]

    def _depth(self, budget: int) -> Sizes | None:
        def shape(count: int) -> Sizes:
            return {"keep_layers": count}

        return self._largest(shape, 1, self.text.num_hidden_layers - 1, budget)

    def _scaled(self, names: tuple[str, ...], fixed: Sizes, budget: int) -> Sizes | None:
        """Scale sizes by the largest common factor that fits, then add neurons as long as there is room."""

        def shape(scale: int) -> Sizes:
            sizes = fixed | {name: self._rounded(self._step(name), name, scale) for name in names}
            if "hidden_size" in sizes:  # some configs allow multiples of the number of heads only
                heads = sizes.get("num_attention_heads", self.text.num_attention_heads)
                sizes["hidden_size"] = self._rounded(lcm(heads, 8, self.divisor), "hidden_size", scale)
            return sizes

        sizes = self._largest(shape, int(_SMALLEST_SHARE * _SCALES), _SCALES, budget)
        for name in names if sizes is not None else ():
            if name.endswith("intermediate_size"):
                sizes = self._enlarged(sizes or {}, name, budget)
        sizes = {name: size for name, size in (sizes or {}).items() if size != getattr(self.text, name, None)}
        return sizes if names[0] in sizes else None  # otherwise it is a shape of another kind

    def _enlarged(self, sizes: Sizes, name: str, budget: int) -> Sizes:
        step = self._step(name)

        def shape(steps: int) -> Sizes:
            return sizes | {name: sizes[name] + steps * step}

        most = (getattr(self.text, name) - sizes[name]) // step
        return self._largest(shape, 0, most, budget) or sizes

    def _largest(self, shape: Callable[[int], Sizes], low: int, high: int, budget: int) -> Sizes | None:
        """Return the largest shape of a sequence that fits, by bisection; None if the first one does not fit."""
        if high < low or self.count(shape(low)) > budget:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(shape(middle)) <= budget else (low, middle - 1)
        return shape(low)

    def _rounded(self, step: int, name: str, scale: int) -> int:
        """Return a share of a size of the teacher, as a multiple of a step."""
        size = getattr(self.text, name)
        least = (getattr(self.text, "num_experts_per_tok", None) or 1) if name == "num_experts" else step
        return max(min(round(size * scale / _SCALES / step), size // step) * step, least)

    def _step(self, name: str) -> int:
        """Return what a size is a multiple of: of 8 to 64 for channels and neurons, so that products are fast."""
        if name == "num_attention_heads":
            return self.head_step
        if name == "num_experts":
            return 1
        size = getattr(self.text, name)
        return lcm(
            self.divisor, next(step for least, step in ((4096, 64), (1024, 32), (256, 16), (0, 8)) if size >= least)
        )
