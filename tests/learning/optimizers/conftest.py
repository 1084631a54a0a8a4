"""A model to take a step with."""

import torch

from scaling_testbed.learning.optimizers import set_lr
from scaling_testbed.model.config import ModelConfig, ParametrizationConfig
from scaling_testbed.model.transformer import Transformer


def model(parametrization=None, **fields):
    config = ModelConfig(d_model=32, n_layers=1, n_heads=2, **fields).resolved(50)
    built = Transformer(config, parametrization or ParametrizationConfig())
    built.init_weights(0)
    return built


def weights_after(config, lrs, transformer=None, gradients=1.0):
    """The weights after one step per rate in `lrs`, with fixed random gradients of that size."""
    transformer = transformer or model()
    optimizer = config.build(transformer)
    for index, lr in enumerate(lrs):
        generator = torch.Generator().manual_seed(index)
        for parameter in transformer.parameters():
            parameter.grad = gradients * torch.randn(parameter.shape, generator=generator)
        set_lr(optimizer, lr)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
