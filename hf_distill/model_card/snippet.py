"""The code example of a card, which loads and runs the model."""

import json

from .data import CardData


def snippet_of(facts: CardData) -> str | None:
    """Return Python code that loads the model from the Hub and runs it once; None for a task without an example.

    That for a module outside transformers loads its weights.
    """
    if class_name := facts.student.get("class_name"):
        return _state_dict(facts, class_name)
    if facts.task == "text-generation":
        call = 'generated = pipe(prompt, max_new_tokens=40)[0]["generated_text"]\nprint(generated{})'
        last_message = '[-1]["content"]' if not isinstance(facts.prompt, str) and facts.prompt else ""
        return _pipeline(facts, facts.prompt or "Once upon a time", call.format(last_message))
    if facts.task == "image-text-to-text":
        parts = [{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What does the picture show?"}]
        call = 'print(pipe(text=prompt, max_new_tokens=40)[0]["generated_text"][-1]["content"])'
        return _pipeline(facts, [{"role": "user", "content": parts}], call)
    if facts.task == "fill-mask":
        return _pipeline(
            facts, None, 'print(pipe(f"The capital of France is {pipe.tokenizer.mask_token}.")[0]["token_str"])'
        )
    if facts.task in ("text-classification", "token-classification"):
        return _pipeline(facts, facts.prompt or "This is a text.", "print(pipe(prompt))")
    return None


def _state_dict(facts: CardData, class_name: str) -> str:
    repo = json.dumps(facts.repo)
    return (
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
        f"model = {class_name}(...)  # with the arguments of the training\n"
        f'model.load_state_dict(load_file(hf_hub_download({repo}, "model.safetensors")))'
    )


def _pipeline(facts: CardData, prompt: object, call: str) -> str:
    prompt_line = f"prompt = {json.dumps(prompt, ensure_ascii=False)}\n" if prompt is not None else ""
    task, repo = json.dumps(facts.task), json.dumps(facts.repo)
    return f"from transformers import pipeline\n\npipe = pipeline({task}, model={repo})\n{prompt_line}{call}"
