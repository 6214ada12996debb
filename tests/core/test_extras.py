"""The command that installs what a recipe needs."""

import pytest

from hf_distill.core.extras import install_command


@pytest.mark.parametrize(
    ("recipe", "extras"),
    [
        ({"student": {"model": "a"}, "teacher": {"model": "b", "quantization": None}}, ""),
        ({"student": {"quantize": {"scheme": "int4"}}}, "[torchao]"),
        ({"student": {"lora": {"r": 8}, "quantization": "nf4"}, "on_policy": {"fraction": 0.5}}, "[peft,quant,trl]"),
        ({"teachers": [{"model": "b"}, {"kind": "cached", "source": {"model": "x/y.gguf"}}]}, "[gguf]"),
        ({"teacher": {"deepspeed": "zero3.json"}, "generate": {"backend": "vllm"}}, "[deepspeed,vllm]"),
    ],
)
def test_the_command_has_the_extras_of_the_recipe(recipe, extras):
    assert install_command(recipe) == (f'pip install "hf-distill{extras}"' if extras else "pip install hf-distill")
