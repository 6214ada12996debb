"""Losses on features: the layers that they compare, and their weighted sum, computed in the student's forward."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..core.loss_kinds import EMBEDDING
from ..core.pooling import PooledRows, document_numbers
from ..core.signals import FeatureKey
from ..core.targets import FeatureTokens, RowPositions, Targets, token_counts
from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import LEARNED, Pairs, map_layers
from ..losses.embedding import EMBEDDING_SIMILARITY, embedding_cosine
from ..losses.objective import Term
from .blocks import LayerStack, get_layer_stack
from .projectors import LayerMixture, ProjectorConfig
from .pruned_origin import PrunedOrigin, origin_of
from .sidecar import Sidecar

StackOf = Callable[[Term], LayerStack]  # returns the layers of the teacher that a term reads


@dataclass(frozen=True)
class FeatureTerm:
    """A term on features, with the layers that it compares.

    term:    term of the objective
    pairs:   (student layer, teacher layer); those from which a learned mapping starts
    student: the student's layers
    teacher: the teacher's layers
    origin:  what the student was pruned from; None if it was not pruned
    """

    term: Term
    pairs: Pairs
    student: LayerStack
    teacher: LayerStack
    origin: PrunedOrigin | None = None

    @property
    def is_learned(self) -> bool:
        """Whether the layer mapping is learned: each student layer is compared with a mixture of all teacher layers."""
        return self.term.layers == LEARNED

    @property
    def channels(self) -> tuple[int, ...] | None:
        """The teacher's hidden channels that the student kept; None if it was not pruned from this teacher's width."""
        return None if self.origin is None else self.origin.channels_of(self.student.width, self.teacher.width)

    def student_key(self, layer: int) -> FeatureKey:
        """Return the key of the feature that the term reads in a layer of the student."""
        pooling = None if self.term.pooling is None else self.term.pooling[0]
        return FeatureKey(str(self.term.loss.feature), layer, self.term.stack, pooling=pooling)

    def teacher_key(self, layer: int) -> FeatureKey:
        """Return the key of the feature that the term reads in a layer of the teacher."""
        pooling = None if self.term.pooling is None else self.term.pooling[1]
        return replace(self.student_key(layer), teacher=self.term.teacher, pooling=pooling)

    def teacher_layers(self) -> Iterable[int]:
        """Return the layers of the teacher that the term reads."""
        return range(len(self.teacher.blocks)) if self.is_learned else {t for _, t in self.pairs}

    def __call__(
        self,
        student: Mapping[FeatureKey, Tensor],
        teacher: Mapping[FeatureKey, Tensor],
        tokens: Targets,
        sidecar: Sidecar,
    ) -> Tensor:
        """Return the scaled, unweighted loss of each token, averaged over the pairs of layers, [N].

        Args:
            student: features of the student.
            teacher: features of the teacher.
            tokens: the N tokens.
            sidecar: holds the projectors and learned mappings.
        """
        total = None
        for pair in self.compared(student, teacher, tokens, sidecar):
            values = self.term(*pair, tokens)
            total = values if total is None else total + values
        assert total is not None, "a mapping has at least one pair"
        return total / len(self.pairs)

    def compared(
        self,
        student: Mapping[FeatureKey, Tensor],
        teacher: Mapping[FeatureKey, Tensor],
        tokens: Targets,
        sidecar: Sidecar,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the features of student, projected if there is a projector, and teacher for each pair of layers."""
        projectors = cast(nn.ModuleDict | None, sidecar.get("projectors", self.term.name))
        shares = cast(LayerMixture, sidecar.get("mappings", self.term.name))() if self.is_learned else None
        device = tokens.positions.device
        teacher_features = {j: teacher[self.teacher_key(j)].to(device) for j in self.teacher_layers()}
        for i, (student_layer, teacher_layer) in enumerate(self.pairs):
            student_feature = student[self.student_key(student_layer)].to(device)
            if projectors is not None:
                student_feature = projectors[f"{student_layer}-{teacher_layer}"](student_feature)
            if shares is None:
                teacher_feature = teacher_features[teacher_layer]
            else:
                teacher_feature = sum(shares[i, j] * feature for j, feature in teacher_features.items())
            yield student_feature, teacher_feature


@dataclass
class FeatureLoss:
    """The loss on the features of one batch.

    terms:            on features
    teacher_features: the teacher's features
    tokens:           stack -> the N tokens whose features are compared
    targets:          T target tokens
    num_items:        divisor of the sum, number of target tokens of the global batch; None for T
    per_token:        name -> [T], set by `total`: the scaled, unweighted terms, and the cosine similarity of the
                      embeddings that the first term on embeddings compares
    """

    terms: list[FeatureTerm]
    teacher_features: Mapping[FeatureKey, Tensor]
    tokens: Mapping[str | None, FeatureTokens]
    targets: Targets
    num_items: Tensor | int | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)

    def total(self, student_features: Mapping[FeatureKey, Tensor], sidecar: Sidecar) -> Tensor:
        """Return the sum over target tokens of the weighted terms / num_items, [].

        Args:
            student_features: features of the student.
            sidecar: holds the projectors and learned mappings.
        """
        total = torch.zeros((), device=self.targets.labels.device)
        for feature_term in self.terms:
            tokens, term = self.tokens[feature_term.term.stack], feature_term.term
            tokens = tokens.resolved() if isinstance(tokens, RowPositions) else tokens
            token_losses = feature_term(student_features, self.teacher_features, tokens, sidecar)
            values = tokens.to_target_tokens(token_losses, self.targets)
            if self.targets.weights is not None:
                values = values * self.targets.weights
            self.per_token[term.name] = values.detach()
            if term.loss.feature == EMBEDDING and EMBEDDING_SIMILARITY not in self.per_token:
                with torch.no_grad():
                    compared = feature_term.compared(student_features, self.teacher_features, tokens, sidecar)
                    similarity = 1 - embedding_cosine(*next(compared), tokens)
                self.per_token[EMBEDDING_SIMILARITY] = tokens.to_target_tokens(similarity, self.targets)
            total = total + term.weight * values.sum()
        return total / self.targets.divisor(self.num_items)


@dataclass(frozen=True)
class Features:
    """The terms on features of an objective, resolved for a student and a teacher.

    terms:      resolved terms; none by default
    projectors: settings of the projectors
    """

    terms: list[FeatureTerm] = field(default_factory=list)
    projectors: ProjectorConfig = field(default_factory=lambda: ProjectorConfig.of(None))

    @classmethod
    def match(
        cls, terms: Iterable[Term], student: nn.Module, teacher: StackOf, projectors: ProjectorConfig
    ) -> "Features":
        """Resolve the terms on features for two models.

        Args:
            terms: terms of the objective; those on logits and labels are left out.
            student: the model.
            teacher: returns the teacher's layers for a term.
            projectors: settings of the projectors.

        Raises:
            DistillError: a model does not have a layer, or widths or attention do not fit; the message names all
                problems.
        """
        resolved: list[FeatureTerm] = []
        problems: list[str] = []
        for term in (term for term in terms if term.loss.feature):
            with collect_errors(problems):
                resolved.append(_resolve_term(term, student, teacher))
                widths = (resolved[-1].student.width, resolved[-1].teacher.width)
                if term.loss.project and projectors.needs_projector(*widths):
                    projectors.check_channels(resolved[-1].channels)
        raise_if_any(problems)
        return cls(resolved, projectors)

    @property
    def layout(self) -> tuple:
        """All values that decide which projectors and learned mappings exist."""
        terms = [
            (
                m.term.name,
                m.term.loss.project,
                m.is_learned,
                m.pairs,
                m.student.width,
                m.teacher.width,
                m.channels,
                len(m.teacher.blocks),
            )
            for m in self.terms
        ]
        return self.projectors, terms

    def parts(self, seed: int) -> dict[str, dict[str, nn.Module]]:
        """Build the projectors and learned mappings of these terms, for a sidecar."""
        generator = torch.Generator().manual_seed(seed)
        projectors: dict[str, nn.Module] = {}
        mappings: dict[str, nn.Module] = {}
        for feature_term in self.terms:
            widths = (feature_term.student.width, feature_term.teacher.width)
            if feature_term.term.loss.project and self.projectors.needs_projector(*widths):
                channels = feature_term.channels
                built = {f"{s}-{t}": self.projectors.build(*widths, generator, channels) for s, t in feature_term.pairs}
                projectors[feature_term.term.name] = nn.ModuleDict(built)
            if feature_term.is_learned:
                mappings[feature_term.term.name] = LayerMixture(feature_term.pairs, len(feature_term.teacher.blocks))
        return {"projectors": projectors, "mappings": mappings}

    def numbers_to_read(self, inputs: dict) -> dict[str, Tensor]:
        """Return the numbers of a batch that `tokens` needs on the host, for `Targets.from_batch`."""
        numbers = token_counts(inputs) if self.terms else {}
        return numbers | (document_numbers(inputs) if EMBEDDING in self._stacks() else {})

    def tokens(self, inputs: dict, targets: Targets) -> dict[str | None, FeatureTokens]:
        """Return, for each stack that a term reads, the N tokens whose features are compared."""
        return {
            key: PooledRows(targets, inputs)
            if key == EMBEDDING
            else targets.feature_tokens(inputs, stack.causal, stack.name)
            for key, stack in self._stacks().items()
        }

    def _stacks(self) -> dict[str | None, LayerStack]:
        return {feature_term.term.stack: feature_term.student for feature_term in self.terms}

    def student_requests(self, tokens: Mapping[str | None, FeatureTokens]) -> dict[FeatureKey, FeatureTokens]:
        """Return the features to capture in the student, with their tokens."""
        feature_keys = (
            feature_term.student_key(layer) for feature_term in self.terms for layer, _ in feature_term.pairs
        )
        return {key: tokens[key.stack] for key in feature_keys}

    def teacher_requests(self, tokens: Mapping[str | None, FeatureTokens]) -> dict[FeatureKey, FeatureTokens]:
        """Return the features to request from the teacher, with their tokens."""
        feature_keys = (
            feature_term.teacher_key(layer) for feature_term in self.terms for layer in feature_term.teacher_layers()
        )
        return {key: tokens[key.stack] for key in feature_keys}


def _resolve_term(term: Term, student: nn.Module, teacher: StackOf) -> FeatureTerm:
    student_stack, teacher_stack = get_layer_stack(student, term.stack), teacher(term)
    if student_stack.layerdrop is not None and term.loss.feature != EMBEDDING:
        raise DistillError(
            f"{term.name} compares layers of the student, and `{student_stack.layerdrop}` of its config skips layers "
            f"at random in training, which then have no output: load the student with {student_stack.layerdrop}=0.0, "
            "or use losses on logits."
        )
    if term.loss.feature == "attention":
        for role, stack in (("student", student_stack), ("teacher", teacher_stack)):
            if stack.attention != "eager":
                raise DistillError(
                    f"{term.loss.name} needs attention maps, and the {role}'s {stack.attention} attention computes "
                    f"none. Load the {role} with attn_implementation='eager', or use value_relation, which needs no "
                    "maps."
                )
    if term.loss.feature == EMBEDDING:
        return FeatureTerm(term, [(0, 0)], student_stack, teacher_stack)
    origin, depths = origin_of(student), (len(student_stack.blocks), len(teacher_stack.blocks))
    kept = None if origin is None else origin.layers_of(student_stack.name, *depths)
    try:
        pairs = map_layers(term.layers, *depths, kept)
    except DistillError as error:
        raise DistillError(f"{term.name}: {error}") from None
    return FeatureTerm(term, pairs, student_stack, teacher_stack, origin)
