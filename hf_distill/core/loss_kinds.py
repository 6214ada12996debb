"""What losses compare of student and teacher, besides logits. Imports no torch."""

FEATURES = ("hidden", "attention", "values")
# What losses compare of a teacher with another tokenizer; see `core/aligned_logits.py`.
CHUNK_LOG_PROBS, FIRST_LOGITS = "chunk_log_probs", "first_logits"
CHUNKS = (CHUNK_LOG_PROBS, FIRST_LOGITS)
# What the outputs of a model are, and so what its losses are defined for; see `losses/output_types.py`.
DISTRIBUTION, BERNOULLIS, REAL_VALUES, SPANS = "distribution", "bernoullis", "real_values", "spans"
OUTPUTS = [DISTRIBUTION, BERNOULLIS, REAL_VALUES, SPANS]  # classes derived from `OutputType` add theirs
