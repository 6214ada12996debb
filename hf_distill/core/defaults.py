"""Defaults of options that several interfaces have: recipes, configs, functions and commands. Imports no torch."""

from typing import Final

# The objective.
TEMPERATURE = 2.0
CROSS_TOKENIZER_TEMPERATURE = 1.0  # of losses for a teacher with another tokenizer
ALPHA = 0.5
DIVERGENCE = "forward_kl"

# Projectors and views of a batch.
PROJECTOR_KIND: Final = "auto"
PROJECTOR_INIT: Final = "auto"
SPAN_LENGTH_TOKENS = 3

# Training.
TRAINING_SEED = 42  # of TrainingArguments
MAX_CONSECUTIVE_NONFINITE_STEPS = 5

# Pruned students.
IMPORTANCE_MEASURE: Final = "activation"

# Quantized students.
INT4_GROUP_SIZE = 32

# Teacher caches.
CACHE_KIND: Final = "hidden"
SAMPLES_PER_TOKEN = 12  # kind sampled
TOP_K_IDS = 64  # kind top_k
CACHE_DTYPE = "bfloat16"  # kind hidden
CACHE_SEED = 0
SHARD_ROWS = 256

# Data.
SPLIT = "train"
EVALUATION_SPLIT = "test"
OVERFLOW: Final = "truncate"
STOPPING_STRATEGY: Final = "first_exhausted"
PREVIEWED_ROWS = 3

# Pruning.
CALIBRATION_ROWS = 8  # that measure block influence and activations

# Generation.
MAX_NEW_TOKENS = 512

# Planning.
MODEL_FLOP_UTILIZATION = 0.4
PEAK_TFLOPS = 989.0  # of an H100 in bf16, dense
PRETRAINING_TOKENS = 2e12
GPU_BANDWIDTH_TB_PER_SECOND = 3.35  # of an H100 (SXM)
GENERATION_PROMPT_TOKENS = 256  # mean of the prompts of a generation, if it is not given

# Analysis and reports.
HELD_OUT_TOKENS = 4096
NUM_CANDIDATE_IDS = 10
LM_EVAL_BATCH_ROWS = 8
SEARCH_CRITERION, SEARCH_ETA = "nll", 2
SHAPE_SEARCH_STEPS = 16
SAMPLE_TOKENS = 48
PROMPT_TOKENS = 32  # of a held-out row whose target tokens begin at its start
DRAFT_PROMPTS, DRAFT_NEW_TOKENS, DRAFTED_TOKENS = 8, 64, 4

# Remote teachers.
REQUEST_TIMEOUT_SECONDS = 120.0
RETRY_SECONDS = 300.0
CONCURRENT_REQUESTS = 16
SERVE_HOST, SERVE_PORT = "127.0.0.1", 9000
SERVE_BATCH_TOKENS = 16_384  # of a forward of hf-distill serve, with padding
SERVE_QUEUED_TOKENS = 64 * SERVE_BATCH_TOKENS
