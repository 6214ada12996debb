"""The terms on features: which layers they compare, and their sum, taken inside the student's forward."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..core.signals import RowPositions, Tap, Targets
from ..errors import DistillError, noted, tell
from ..layers import LEARNED, Pairs, map_layers
from ..losses.objective import Term
from .blocks import Stack, stack_of
from .projectors import LayerMixture, Projectors
from .sidecar import Sidecar

StackOf = Callable[[Term], Stack]  # of the teacher that a term follows


@dataclass(frozen=True)
class FeatureTerm:
    """A term, and the layers that it compares in one student and one teacher.

    pairs:   (student, teacher) layers; of a learned mapping: where it starts
    student: the student's stack
    teacher: the teacher's
    """

    term: Term
    pairs: Pairs
    student: Stack
    teacher: Stack

    @property
    def learned(self) -> bool:
        """Whether each student layer learns from a trained mixture of all teacher layers."""
        return self.term.layers == LEARNED

    def said(self, layer: int) -> Tap:
        """What the term looks at in a layer of the student."""
        return Tap(str(self.term.loss.feature), layer, self.term.stack)

    def told(self, layer: int) -> Tap:
        """What the term looks at in a layer of the teacher."""
        return replace(self.said(layer), teacher=self.term.teacher)

    def teacher_layers(self) -> Iterable[int]:
        """Layers of the teacher that it looks at."""
        return range(len(self.teacher.blocks)) if self.learned else {t for _, t in self.pairs}

    def __call__(self, student: Mapping[Tap, Tensor], teacher: Mapping[Tap, Tensor], tokens: Targets, sidecar: Sidecar):
        """Mean over the pairs of the scaled, unweighted loss of each token, [N]."""
        projectors = sidecar.part("projectors", self.term.name)
        shares = sidecar.part("mappings", self.term.name)() if self.learned else None
        device = tokens.positions.device
        told = {j: teacher[self.told(j)].to(device) for j in self.teacher_layers()}
        total = None
        for i, (s_layer, t_layer) in enumerate(self.pairs):
            said = student[self.said(s_layer)].to(device)
            said = said if projectors is None else projectors[f"{s_layer}-{t_layer}"](said)
            heard = told[t_layer] if shares is None else sum(shares[i, j] * layer for j, layer in told.items())
            values = self.term(said, heard, tokens)
            total = values if total is None else total + values
        assert total is not None, "a mapping has at least one pair"
        return total / len(self.pairs)


@dataclass
class FeatureJob:
    """What to compare in one batch, and what was found.

    terms:     on features
    told:      the teacher's features
    tokens:    stack -> the N tokens whose features are compared
    targets:   T asked tokens
    num_items: what the sum is divided by; None: T
    per_token: name -> [T], filled by a run
    """

    terms: list[FeatureTerm]
    told: Mapping[Tap, Tensor]
    tokens: Mapping[str | None, Targets]
    targets: Targets
    num_items: Tensor | int | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)

    def total(self, said: Mapping[Tap, Tensor], sidecar: Sidecar) -> Tensor:
        """Sum over asked tokens of the weighted terms / num_items, []."""
        total = torch.zeros((), device=self.targets.labels.device)
        for matched in self.terms:
            tokens, term = self.tokens[matched.term.stack], matched.term
            tokens = tokens.found() if isinstance(tokens, RowPositions) else tokens
            values = tokens.spread(matched(said, self.told, tokens, sidecar), self.targets)
            self.per_token[term.name] = values.detach()
            total = total + term.weight * values.sum()
        return total / self.targets.items(self.num_items).to(total.device)


@dataclass(frozen=True)
class Features:
    """The terms on features of an objective, matched to a student and a teacher; none of them by default.

    terms:      matched
    projectors: what stands between hidden states
    """

    terms: list[FeatureTerm] = field(default_factory=list)
    projectors: Projectors = field(default_factory=Projectors)

    @classmethod
    def match(cls, terms: Iterable[Term], student: nn.Module, teacher: StackOf, projectors: Projectors) -> "Features":
        """Match terms to two models.

        Args:
            terms: of the objective; those on logits are left out.
            student: the model.
            teacher: what tells the blocks that a term looks at in its teacher.
            projectors: what stands between hidden states.

        Raises:
            DistillError: layers that a model does not have, widths or attention that do not fit; all of it at once.
        """
        matched: list[FeatureTerm] = []
        problems: list[str] = []
        for term in (term for term in terms if term.loss.feature):
            with noted(problems):
                matched.append(_matched(term, student, teacher))
                if term.loss.project:
                    projectors.between(matched[-1].student.width, matched[-1].teacher.width)
        tell(problems)
        return cls(matched, projectors)

    @property
    def layout(self) -> tuple:
        """What decides which projectors and mixtures there are."""
        terms = [
            (
                m.term.name,
                m.term.loss.project,
                m.learned,
                m.pairs,
                m.student.width,
                m.teacher.width,
                len(m.teacher.blocks),
            )
            for m in self.terms
        ]
        return self.projectors, terms

    def parts(self, seed: int) -> dict[str, dict[str, nn.Module]]:
        """New projectors and mixtures for these terms, for a sidecar."""
        generator = torch.Generator().manual_seed(seed)
        projectors: dict[str, nn.Module] = {}
        mappings: dict[str, nn.Module] = {}
        for matched in self.terms:
            widths = (matched.student.width, matched.teacher.width)
            if matched.term.loss.project and self.projectors.between(*widths):
                built = {f"{s}-{t}": self.projectors.build(*widths, generator) for s, t in matched.pairs}
                projectors[matched.term.name] = nn.ModuleDict(built)
            if matched.learned:
                mappings[matched.term.name] = LayerMixture(matched.pairs, len(matched.teacher.blocks))
        return {"projectors": projectors, "mappings": mappings}

    def tokens(self, inputs: dict, targets: Targets) -> dict[str | None, Targets]:
        """Of each stack that is looked at, the N tokens whose features are compared."""
        stacks = {matched.term.stack: matched.student for matched in self.terms}
        return {key: targets.tokens(inputs, stack.causal, stack.name) for key, stack in stacks.items()}

    def said(self, tokens: Mapping[str | None, Targets]) -> dict[Tap, Targets]:
        """What to capture in the student."""
        taps = (matched.said(layer) for matched in self.terms for layer, _ in matched.pairs)
        return {tap: tokens[tap.stack] for tap in taps}

    def wanted(self, tokens: Mapping[str | None, Targets]) -> dict[Tap, Targets]:
        """What to ask of the teacher."""
        taps = (matched.told(layer) for matched in self.terms for layer in matched.teacher_layers())
        return {tap: tokens[tap.stack] for tap in taps}


def _matched(term: Term, student: nn.Module, teacher: StackOf) -> FeatureTerm:
    own, other = stack_of(student, term.stack), teacher(term)
    if term.loss.feature == "attention":
        for who, stack in (("student", own), ("teacher", other)):
            if stack.attention != "eager":
                raise DistillError(
                    f"{term.loss.name} needs maps, which the {who}'s {stack.attention} attention never makes. Load the "
                    f"{who} with attn_implementation='eager', or use value_relation, which needs none."
                )
    try:
        pairs = map_layers(term.layers, len(own.blocks), len(other.blocks))
    except DistillError as error:
        raise DistillError(f"{term.name}: {error}") from None
    return FeatureTerm(term, pairs, own, other)
