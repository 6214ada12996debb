"""The checksum of weights recognizes a model, and sees a change of any parameter."""

import torch
from accelerate import cpu_offload
from tiny import build

from hf_distill.cache.fingerprints import weights_fingerprint


def test_a_change_of_any_parameter_changes_the_fingerprint():
    model = build("llama", 0)
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(build("llama", 0))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(2)
            assert weights_fingerprint(model) != before
            parameter.div_(2)
    assert weights_fingerprint(model) == before


def test_offloaded_parameters_are_read_by_name_and_shape():
    """A device map moves them to the meta device, from which no value can be copied."""
    model, other = cpu_offload(build("llama", 0)), cpu_offload(build("llama", 1))
    assert next(model.parameters()).is_meta
    assert weights_fingerprint(model) == weights_fingerprint(other)
    assert weights_fingerprint(model) != weights_fingerprint(cpu_offload(build("llama", 0, layers=3)))
