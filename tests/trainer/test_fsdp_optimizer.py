"""The optimizer gets the parameters that FSDP2 trains, also after a forward that left them gathered."""

import torch
from tiny import collate, rows
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def test_the_optimizer_after_an_evaluation_has_the_sharded_parameters(make_trainer, mesh):
    trainer = make_trainer()
    fully_shard(trainer.model, mesh=mesh, reshard_after_forward=False)
    with torch.no_grad():
        trainer.model(**collate(rows("llama", 2)))
    assert not any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    optimizer = trainer.create_optimizer()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(parameters) == len(list(trainer.model.parameters()))
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
