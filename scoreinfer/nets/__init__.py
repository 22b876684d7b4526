"""Networks (backbones) and embeddings; they do not depend on any SDE."""

from scoreinfer.nets.convnet import ConvNet
from scoreinfer.nets.embedding import Concatenate, DeepSet, Embedding, Series
from scoreinfer.nets.groups import MaskedGroups
from scoreinfer.nets.mlp import ConditionalMLP, ResidualMLP
from scoreinfer.nets.rows import MaskedRows

__all__ = [
    "Concatenate",
    "ConditionalMLP",
    "ConvNet",
    "DeepSet",
    "Embedding",
    "MaskedGroups",
    "MaskedRows",
    "ResidualMLP",
    "Series",
]
