"""The terms on features: which layers they compare, and their sum, taken inside the student's forward."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..core.signals import FeatureKey
from ..core.targets import RowPositions, Targets
from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import LEARNED, Pairs, map_layers
from ..losses.objective import Term
from .blocks import LayerStack, get_layer_stack
from .projectors import LayerMixture, ProjectorConfig
from .sidecar import Sidecar

StackOf = Callable[[Term], LayerStack]  # of the teacher that a term follows


@dataclass(frozen=True)
class FeatureTerm:
    """A term, and the layers that it compares in one student and one teacher.

    pairs:   (student, teacher) layers; of a learned mapping: where it starts
    student: the student's stack
    teacher: the teacher's
    """

    term: Term
    pairs: Pairs
    student: LayerStack
    teacher: LayerStack

    @property
    def learned(self) -> bool:
        """Whether each student layer learns from a trained mixture of all teacher layers."""
        return self.term.layers == LEARNED

    def said(self, layer: int) -> FeatureKey:
        """What the term looks at in a layer of the student."""
        return FeatureKey(str(self.term.loss.feature), layer, self.term.stack)

    def told(self, layer: int) -> FeatureKey:
        """What the term looks at in a layer of the teacher."""
        return replace(self.said(layer), teacher=self.term.teacher)

    def teacher_layers(self) -> Iterable[int]:
        """Layers of the teacher that it looks at."""
        return range(len(self.teacher.blocks)) if self.learned else {t for _, t in self.pairs}

    def __call__(
        self,
        student: Mapping[FeatureKey, Tensor],
        teacher: Mapping[FeatureKey, Tensor],
        tokens: Targets,
        sidecar: Sidecar,
    ):
        """Mean over the pairs of the scaled, unweighted loss of each token, [N]."""
        projectors = sidecar.get("projectors", self.term.name)
        shares = sidecar.get("mappings", self.term.name)() if self.learned else None
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
class FeatureLoss:
    """What to compare in one batch, and what was found.

    terms:     on features
    told:      the teacher's features
    tokens:    stack -> the N tokens whose features are compared
    targets:   T asked tokens
    num_items: what the sum is divided by; None: T
    per_token: name -> [T], filled by a run
    """

    terms: list[FeatureTerm]
    told: Mapping[FeatureKey, Tensor]
    tokens: Mapping[str | None, Targets]
    targets: Targets
    num_items: Tensor | int | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)

    def total(self, said: Mapping[FeatureKey, Tensor], sidecar: Sidecar) -> Tensor:
        """Sum over asked tokens of the weighted terms / num_items, []."""
        total = torch.zeros((), device=self.targets.labels.device)
        for matched in self.terms:
            tokens, term = self.tokens[matched.term.stack], matched.term
            tokens = tokens.found() if isinstance(tokens, RowPositions) else tokens
            values = tokens.to_target_tokens(matched(said, self.told, tokens, sidecar), self.targets)
            self.per_token[term.name] = values.detach()
            total = total + term.weight * values.sum()
        return total / self.targets.divisor(self.num_items).to(total.device)


@dataclass(frozen=True)
class Features:
    """The terms on features of an objective, matched to a student and a teacher; none of them by default.

    terms:      matched
    projectors: what stands between hidden states
    """

    terms: list[FeatureTerm] = field(default_factory=list)
    projectors: ProjectorConfig = field(default_factory=ProjectorConfig)

    @classmethod
    def match(
        cls, terms: Iterable[Term], student: nn.Module, teacher: StackOf, projectors: ProjectorConfig
    ) -> "Features":
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
            with collect_errors(problems):
                matched.append(_matched(term, student, teacher))
                if term.loss.project:
                    projectors.needs_projector(matched[-1].student.width, matched[-1].teacher.width)
        raise_if_any(problems)
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
            if matched.term.loss.project and self.projectors.needs_projector(*widths):
                built = {f"{s}-{t}": self.projectors.build(*widths, generator) for s, t in matched.pairs}
                projectors[matched.term.name] = nn.ModuleDict(built)
            if matched.learned:
                mappings[matched.term.name] = LayerMixture(matched.pairs, len(matched.teacher.blocks))
        return {"projectors": projectors, "mappings": mappings}

    def tokens(self, inputs: dict, targets: Targets) -> dict[str | None, Targets]:
        """Of each stack that is looked at, the N tokens whose features are compared."""
        stacks = {matched.term.stack: matched.student for matched in self.terms}
        return {key: targets.feature_positions(inputs, stack.causal, stack.name) for key, stack in stacks.items()}

    def said(self, tokens: Mapping[str | None, Targets]) -> dict[FeatureKey, Targets]:
        """What to capture in the student."""
        feature_keys = (matched.said(layer) for matched in self.terms for layer, _ in matched.pairs)
        return {key: tokens[key.stack] for key in feature_keys}

    def feature_requests(self, tokens: Mapping[str | None, Targets]) -> dict[FeatureKey, Targets]:
        """What to ask of the teacher."""
        feature_keys = (matched.told(layer) for matched in self.terms for layer in matched.teacher_layers())
        return {key: tokens[key.stack] for key in feature_keys}


def _matched(term: Term, student: nn.Module, teacher: StackOf) -> FeatureTerm:
    own, other = get_layer_stack(student, term.stack), teacher(term)
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
