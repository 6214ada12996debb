"""Students with fewer hidden channels, neurons, heads and experts than their teacher."""

import torch
from tiny import build, collate, rows

from hf_distill.models.importance import measure_importance
from hf_distill.models.pruned_shape import KeptUnits, PrunedShape
from hf_distill.models.width_pruning import keep_units, prune_student


def test_a_pruned_llama_is_loaded_by_from_pretrained_and_made_again_from_its_units(tmp_path):
    teacher, batch = build("llama", layers=4).eval(), collate(rows("llama", 5))
    importance = measure_importance(teacher, [batch])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    student, kept = (pruned := prune_student(teacher, PrunedShape((0, 2, 3), 24, 30), importance)).model, pruned.kept
    assert student.training
    logits = student.eval()(**inputs).logits
    student.save_pretrained(tmp_path)
    assert torch.equal(type(teacher).from_pretrained(tmp_path).eval()(**inputs).logits, logits)
    again = keep_units(teacher, KeptUnits.from_json(kept.to_json()))
    assert torch.equal(again.eval()(**inputs).logits, logits)
    assert (again.config.hidden_size, again.config.intermediate_size, again.config.num_hidden_layers) == (24, 30, 3)
