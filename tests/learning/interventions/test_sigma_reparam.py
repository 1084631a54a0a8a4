"""The singular vectors of reparametrised weights follow them."""

import torch

from scaling_testbed.learning.interventions.base import Context
from scaling_testbed.learning.interventions.sigma_reparam import SigmaReparam
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer


def test_the_vectors_of_every_matrix_follow_the_weights_of_an_update_and_of_none_that_was_left_out():
    model = Transformer(ModelConfig(d_model=16, n_layers=2, linear="sigma_reparam").resolved(11))
    model.init_weights(0)
    names = {name.removesuffix(".left") for name, _ in model.named_buffers() if name.endswith(".left")}
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2}
    assert names == matrices - {"embedding"}
    following = SigmaReparam()
    following.attach(Context(model=model, optimizer=None, sum=list, largest=list))
    before = {name: value.clone() for name, value in model.named_buffers()}
    following.after_update(False)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    following.after_update(True)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_buffers())
