"""Loss functions. Each returns one number for each target token, [T], neither weighted nor summed nor averaged."""

from . import analytic_gradients as _analytic_gradients  # registers the analytic gradients
from . import cross_tokenizer_gradients as _cross_tokenizer_gradients  # likewise
from .attention import attention_kl, value_relation
from .bernoulli import bernoulli_kl, binary_cross_entropy
from .cross_entropy import cross_entropy
from .cross_tokenizer import alm, projected_kl, uld
from .ctc import ctc
from .divergences import adaptive_kl, forward_kl, js, reverse_kl, skew_kl, skew_reverse_kl, total_variation
from .embedding import embedding_cosine, embedding_mse
from .hidden import hidden_cosine, hidden_mse, hidden_normalized_mse, hidden_relation
from .output_types import Bernoullis, Distribution, Embeddings, OutputType, RealValues, RowOutputs, Spans
from .real_values import margin_mse, mse, squared_error
from .registry import LOSSES, Loss, get_loss, loss, register_gradient
from .spans import span_cross_entropy, span_kl

del _analytic_gradients, _cross_tokenizer_gradients

__all__ = [
    "LOSSES",
    "Bernoullis",
    "Distribution",
    "Embeddings",
    "Loss",
    "OutputType",
    "RealValues",
    "RowOutputs",
    "Spans",
    "adaptive_kl",
    "alm",
    "attention_kl",
    "bernoulli_kl",
    "binary_cross_entropy",
    "cross_entropy",
    "ctc",
    "embedding_cosine",
    "embedding_mse",
    "forward_kl",
    "get_loss",
    "hidden_cosine",
    "hidden_mse",
    "hidden_normalized_mse",
    "hidden_relation",
    "js",
    "loss",
    "margin_mse",
    "mse",
    "projected_kl",
    "register_gradient",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "span_cross_entropy",
    "span_kl",
    "squared_error",
    "total_variation",
    "uld",
    "value_relation",
]
