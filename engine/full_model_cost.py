"""What a decoder with any of the techniques on comes to, by arithmetic: parameters, bytes and FLOPs, part by part.

    model = Model(ModelConfig(..., use_lora=True), "everything")
    parameters(model)["adapters"].learning   # numbers that are trained
    sum(model_bytes(model.config).values())  # what get_model_memory_mb finds, to the byte
    flops(model, length=128).forward         # of one token

It counts what `engine.full_model` builds, in float32. Needs no torch.

Legend: L layers, D model width, F feed-forward width, H query heads, G key/value heads, d head width, V vocabulary,
I inputs, O outputs of a matrix, R rank, E experts, K chosen per token, T tokens of a text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from engine.architecture import FEED_FORWARD, ModelConfig
from engine.moe.cost import cheaper_form

Part = Literal["embeddings", "norms", "base matrices", "adapters", "routers"]
StoredPart = Literal["weights", "scales", "adapters", "routers"]
Adapter = Literal["LoRA", "mixture"]
Learning = Literal["everything", "adapters"]
"""What learns beside the adapters: everything that is neither adapted nor in 4 bits, or nothing."""

WIDTH = 4
"""Bytes of a number."""

_BLOCK_SIZES = (64, 32)  # weights a scale, the largest of which whole ones make a row
_OUTER_BLOCK = 256  # scales a second scale
_CODEBOOKS = 4 * (16 + 256 + 1)  # NF4's levels, those of the scales, their mean
_BIAS_BUFFERS = 3  # of a router, E numbers each: bias, nudges, load


@dataclass(frozen=True)
class Matrix:
    """One of a layer's matrices, and what is on it.

    Args:
        name: of the projection.
        inputs, outputs: I and O.
        adapter: beside it; None if there is none.
        in_4_bits: whether it is stored so.
        learns: whether it learns itself.
    """

    name: str
    inputs: int
    outputs: int
    adapter: Adapter | None
    in_4_bits: bool
    learns: bool

    @property
    def size(self) -> int:
        """I·O."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Model:
    """A decoder with techniques, as `engine.full_model` builds it.

    Args:
        config: shape and techniques.
        learning: what learns beside the adapters, "everything" that may or the "adapters" alone if there are any.
    """

    config: ModelConfig
    learning: Learning = "everything"

    @property
    def rest_learns(self) -> bool:
        """Whether embeddings and norms learn, and the matrices that are neither adapted nor in 4 bits."""
        return self.learning == "everything" or not (self.config.use_lora or self.config.use_moe)

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Of one layer."""
        found = []
        for name, (inputs, outputs) in self.config.projections.items():
            adapter = self._adapter(name)
            learns = self.rest_learns and not self.config.use_quantization and adapter is None
            found.append(Matrix(name, inputs, outputs, adapter, self.config.use_quantization, learns))
        return tuple(found)

    def named(self, *names: str) -> tuple[Matrix, ...]:
        """Some of them."""
        return tuple(matrix for matrix in self.matrices if matrix.name in names)

    def _adapter(self, name: str) -> Adapter | None:
        if self.config.use_moe and name in FEED_FORWARD:
            return "mixture"
        return "LoRA" if self.config.use_lora else None


@dataclass(frozen=True)
class Count:
    """Numbers of one part.

    Args:
        total: all of them; codes of 4 bits count as what they stand for.
        learning: those that are trained.
    """

    total: int
    learning: int


@dataclass(frozen=True)
class Flops:
    """Of one token, a multiplication and an addition counted as two.

    Args:
        forward: of the forward pass.
        step: of a training step, forward and backward.
    """

    forward: float
    step: float


def parameters(model: Model) -> dict[Part, Count]:
    """Numbers by part; a tied head counts once.

    embeddings     V·D, twice if the head is its own
    norms          (2·L + 1)·D
    base matrices  L·Σ I·O
    adapters       L·Σ R·(I + O), of a mixture E·R·(I + O)
    routers        L·Σ E·I
    """
    config, layers = model.config, model.config.num_layers
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    norms = (2 * layers + 1) * config.d_model
    base = layers * sum(matrix.size for matrix in model.matrices)
    learning = layers * sum(matrix.size for matrix in model.matrices if matrix.learns)
    adapters = layers * sum(adapter_numbers(config, matrix) for matrix in model.matrices)
    routers = layers * sum(router_numbers(config, matrix) for matrix in model.matrices)
    rest = int(model.rest_learns)
    return {
        "embeddings": Count(embeddings, rest * embeddings),
        "norms": Count(norms, rest * norms),
        "base matrices": Count(base, learning),
        "adapters": Count(adapters, adapters),
        "routers": Count(routers, routers),
    }


def adapter_numbers(config: ModelConfig, matrix: Matrix) -> int:
    """Of what stands beside one matrix: R·(I + O), E times that in a mixture, 0 without an adapter."""
    if matrix.adapter is None:
        return 0
    experts = config.num_experts if matrix.adapter == "mixture" else 1
    return experts * config.lora_rank * (matrix.inputs + matrix.outputs)


def router_numbers(config: ModelConfig, matrix: Matrix) -> int:
    """Of the router of one matrix's mixture: E·I."""
    return config.num_experts * matrix.inputs if matrix.adapter == "mixture" else 0


def model_bytes(config: ModelConfig) -> dict[StoredPart, int]:
    """What the model takes, as `get_model_memory_mb` counts: buffers too, which are the routers' biases.

    A matrix in 4 bits has I·O / 2 bytes of codes. Its scales take a byte for each block of 64 weights (32 where 64 does
    not divide I), 4 bytes for each 256 of those, and the codebooks, 1092 bytes a matrix.

    Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
    """
    model, layers = Model(config), config.num_layers
    counted = parameters(model)
    weights = WIDTH * (counted["embeddings"].total + counted["norms"].total)
    scales = routers = 0
    for matrix in model.matrices:
        if matrix.in_4_bits:
            weights += layers * math.ceil(matrix.size / 2)
            blocks = math.ceil(matrix.size / block_size(matrix.inputs))
            scales += layers * (blocks + 4 * math.ceil(blocks / _OUTER_BLOCK) + _CODEBOOKS)
        else:
            weights += layers * WIDTH * matrix.size
        if matrix.adapter == "mixture":
            routers += layers * WIDTH * (router_numbers(config, matrix) + _BIAS_BUFFERS * config.num_experts)
    return {"weights": weights, "scales": scales, "adapters": WIDTH * counted["adapters"].total, "routers": routers}


def block_size(inputs: int) -> int:
    """Weights that share a scale in a matrix in 4 bits with so many inputs."""
    return next(size for size in _BLOCK_SIZES if inputs % size == 0)


def flops(model: Model, length: int, tokens: int | None = None, on_cuda: bool = False) -> Flops:
    """FLOPs of a token in the mean of a text of T tokens, as they are computed here.

    A product costs 2·I·O forward and as much again for each gradient that somebody wants: of what it reads, of its
    matrix. Attention is 4·H·T·d with all weights and half of it with FlashAttention, which leaves hidden tiles out; the
    backward pass twice that, and 2.5 times with FlashAttention, which computes weights again. A mixture costs what
    `cheaper_form` chooses: all E experts for all tokens, or the K that were chosen.

    Args:
        model: that computes.
        length: T.
        tokens: of the batch, on which a mixture's form depends; T if left out.
        on_cuda: which device chooses.
    """
    config = model.config
    forward = backward = 0.0
    for layer in range(config.num_layers):
        wants = Wants.of(model, first=layer == 0)
        for matrix in model.matrices:
            for product in _products(model, matrix, tokens or length, on_cuda):
                forward += product.cost
                backward += product.cost * (product.gradients + product.of_input * wants.before(matrix.name))
        attention = 4 * config.num_heads * length * config.head_dim * (0.5 if config.use_flashattention else 1.0)
        forward += attention
        backward += wants.attention * attention * (2.5 if config.use_flashattention else 2.0)
    head = 2 * config.d_model * config.vocab_size
    return Flops(forward + head, forward + head + backward + head * (1 + model.rest_learns))


@dataclass(frozen=True)
class Wants:
    """What of a layer's activations wants a gradient: what depends on something that learns.

    Args:
        stream: the layer's input.
        attention: queries, keys or values, and with them attention.
        middle: what the feed-forward network reads.
        gated: what the network's last matrix reads.
    """

    stream: bool
    attention: bool
    middle: bool
    gated: bool

    @classmethod
    def of(cls, model: Model, first: bool) -> Wants:
        """Of the first layer, whose input wants none unless the embeddings learn, or of any other."""

        def learns(*names: str) -> bool:
            return any(matrix.learns or matrix.adapter for matrix in model.named(*names))

        stream = model.rest_learns or not first
        attention = stream or learns("q_proj", "k_proj", "v_proj")
        middle = attention or learns("o_proj")
        return cls(stream, attention, middle, middle or learns("gate_proj", "up_proj"))

    def before(self, name: str) -> bool:
        """Whether what the matrix of this name reads wants one."""
        middle = {"gate_proj": self.middle, "up_proj": self.middle}
        return ({"o_proj": self.attention, "down_proj": self.gated} | middle).get(name, self.stream)


def takes_all_experts(config: ModelConfig, matrix: Matrix, tokens: int, on_cuda: bool) -> bool:
    """Whether a mixture computes every expert for every token."""
    width = matrix.inputs + matrix.outputs
    device = "cuda" if on_cuda else "cpu"
    return cheaper_form(config.num_experts, config.top_k, config.lora_rank, width, device, tokens) == "concatenated"


@dataclass(frozen=True)
class _Product:
    """A matrix product.

    Args:
        cost: FLOPs of a token.
        gradients: those that are always wanted.
        of_input: whether one more is, where what the layer reads wants it.
    """

    cost: float
    gradients: int
    of_input: bool


def _products(model: Model, matrix: Matrix, tokens: int, on_cuda: bool) -> list[_Product]:
    config = model.config
    products = [_Product(2 * matrix.size, int(matrix.learns), True)]
    if matrix.adapter is None:
        return products
    ranks = config.lora_rank
    if matrix.adapter == "mixture":
        all_experts = takes_all_experts(config, matrix, tokens, on_cuda)
        ranks *= config.num_experts if all_experts else config.top_k
        products.append(_Product(2 * config.num_experts * matrix.inputs, 1, True))
    return [*products, _Product(2 * ranks * matrix.inputs, 1, True), _Product(2 * ranks * matrix.outputs, 2, False)]
