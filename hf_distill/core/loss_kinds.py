"""What losses compare of student and teacher, besides logits. Imports no torch."""

EMBEDDING = "embedding"  # the hidden states of a row, pooled to one vector
FEATURES = ("hidden", "attention", "values", EMBEDDING)
POOLINGS = ("mean", "cls", "last")  # over the tokens of a row, its first token, its last one
# What losses compare of a teacher with another tokenizer; see `core/aligned_logits.py`.
CHUNK_LOG_PROBS, FIRST_LOGITS = "chunk_log_probs", "first_logits"
CHUNKS = (CHUNK_LOG_PROBS, FIRST_LOGITS)
# What the outputs of a model are, and so what its losses are defined for; see `losses/output_types/`.
DISTRIBUTION, BERNOULLIS, REAL_VALUES, SPANS = "distribution", "bernoullis", "real_values", "spans"
FRAMES = "frames"  # a distribution for each frame of a sound, with a transcript for the row as label
NO_LOGITS = "embeddings"  # hidden states only: an encoder without a head
OUTPUTS = [
    DISTRIBUTION,
    BERNOULLIS,
    REAL_VALUES,
    SPANS,
    FRAMES,
    NO_LOGITS,
]  # classes derived from `OutputType` add theirs
