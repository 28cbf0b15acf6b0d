"""Where the memory of a training step goes, by arithmetic: what is held throughout, and what comes and goes.

    made = budget(Plan(ModelConfig(...), method="LoRA", weights="nf4, double quantized", batch=4, length=1024))
    made.peak.total, made.peak.name   # bytes, and when in the step
    largest(plan, 24 * GB, "batch")   # how much of it fits

It counts `engine.model.Decoder` in eager mode with PyTorch's fused attention and `engine.lora`'s adapters in float32,
tensor by tensor: what each operation saves for the backward pass, and what it makes on the way. The peak is a maximum
over time, so several moments of a step are counted and the largest is the answer. Needs no torch.

Generating is counted where it holds most, as `engine.generation` reads a prompt of N tokens: all at once, without
anything for a backward pass. Every token after it takes less on the way.

Legend: N = batch · length tokens, L blocks, D model width, F feed-forward width, H query heads, G key/value heads,
d head width, V vocabulary, R rank, I inputs, O outputs, P parameters, w bytes of a number that is computed with.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from engine.saved_activations import saved_by_block, saved_by_body, saved_by_head
from engine.training_plan import Plan

Part = Literal[
    "weights",
    "scales",
    "adapters",
    "optimizer state",
    "gradients",
    "activations",
    "logits and loss",
    "temporary tensors",
    "KV cache",
    "workspace",
]

GB = 10**9
MOST = 2**20
"""The largest batch or length that is looked for."""

PARTS: dict[Part, str] = {
    "weights": "the model's own numbers, in the bits that were chosen; embeddings, head and norms stay in 16 or 32",
    "scales": "what few-bit codes are multiplied by: one for every block of 64 weights, or for every output",
    "adapters": "A and B of every adapted matrix, R·(I + O) numbers in float32",
    "optimizer state": "AdamW's two running means for every trained number",
    "gradients": "one number for every trained one",
    "activations": "what the forward pass keeps of every token for the backward pass",
    "logits and loss": "a score for every token and every word of the vocabulary, and its gradient",
    "temporary tensors": "gradients of activations, what a block makes of a prompt, matrices unpacked for a product",
    "KV cache": "keys and values of every token so far, 2·L·G·d numbers a token",
    "workspace": "what cuBLAS keeps for its products: 32 MiB for each of the two passes",
}
"""Everything that takes memory, in the order in which it is stacked, and what it is."""

_BLOCK, _OUTER_BLOCK = 64, 256  # weights a scale, scales a second scale
_LEVELS = 16
_CODEBOOKS = 4 * (_LEVELS + 256 + 1)  # of a double-quantized layer: NF4's levels, those of the scales, their mean
_STATE_BLOCK = 256
_STATE_MAPS = 2 * 4 * 256  # the values that a byte of state stands for, one table for each of the two means
_LEAST_QUANTIZED_STATE = 4096
_LEAST_PAGED_STATE = 100_000
_WORKSPACE = 2 * 32 * 2**20


@dataclass(frozen=True)
class Moment:
    """What is held at one moment of a step.

    Args:
        name: when.
        parts: bytes by part; what is not there holds nothing.
    """

    name: str
    parts: dict[Part, int]

    @property
    def total(self) -> int:
        """Bytes together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Budget:
    """A step's memory.

    Args:
        moments: in the order of time.
        paged: bytes of optimizer state that need not be on the card; in none of the moments.
        saved: bytes that the forward pass leaves for the backward pass, the loss's included.
    """

    moments: tuple[Moment, ...]
    paged: int
    saved: int

    @property
    def peak(self) -> Moment:
        """The moment that holds most."""
        return max(self.moments, key=lambda moment: moment.total)


def budget(plan: Plan) -> Budget:
    """The memory of one step of `plan`, not the first one: the optimizer's state is there from the start."""
    if plan.method == "generation":
        return Budget(_reading_a_prompt(plan), 0, 0)
    config, N, w = plan.config, plan.tokens, plan.width
    D, V = config.d_model, config.vocab_size
    on_card, paged = optimizer_bytes(plan)
    held = {**_weights(plan), **_adapters(plan), "optimizer state": on_card, **_workspace(plan)}

    body, first, last = saved_by_body(plan), saved_by_block(plan, first=True), saved_by_block(plan)
    head = saved_by_head(plan)
    kept_again = last - N * D * w if plan.checkpointing else 0  # a block's activations; its input is there already
    first_again = max(0, first - N * D * w) if plan.checkpointing else 0
    before_first = N * D * w if plan.checkpointing else first

    gradients = _gradient_bytes(plan)
    of_vocabulary = V * D * w if plan.trains_everything else 0
    to_be_added = of_vocabulary if config.tie_embeddings else 0  # the embedding's gradient to the head's, for a sum
    of_block, of_down = _block_gradients(plan)
    of_others = (config.num_layers - 1) * of_block
    logits = N * V * (w + (4 if w < 4 else 0) + 4)  # as computed, in float32, as log-probabilities
    unpacked = _unpacked_head(plan)
    in_block = _temporary_in_block(plan)

    def moment(name: str, parts: dict[Part, int]) -> Moment:
        held_now = {**held, **parts, "logits and loss": parts.get("logits and loss", 0) + 16 * N}  # the ids in int64
        return Moment(name, {part: held_now[part] for part in PARTS if held_now.get(part)})

    moments = (
        moment("the end of the forward pass", {"activations": body + head, "logits and loss": logits}),
        moment("the gradient of the loss", {"activations": body + head, "logits and loss": 12 * N * V}),
        moment(
            "the backward pass of the head",
            {
                "activations": body + head,
                "logits and loss": N * V * w,
                "gradients": of_vocabulary,
                "temporary tensors": N * D * w + unpacked,
            },
        ),
        moment(
            "the backward pass of the last block",
            {
                "activations": body + kept_again,
                "gradients": of_vocabulary + of_down,
                "temporary tensors": in_block,
            },
        ),
        moment(
            "the backward pass of the first block",
            {
                "activations": before_first + first_again,
                "gradients": of_vocabulary + of_others + of_down,
                "temporary tensors": in_block,
            },
        ),
        moment(
            "the end of the backward pass",
            {
                "gradients": gradients + to_be_added,
                "temporary tensors": max(N * D * w, to_be_added) if plan.trains_everything else 0,
            },
        ),
        moment("the update", {"gradients": gradients}),
    )
    return Budget(moments, paged, body + head + 4 * N * V)


def largest(plan: Plan, card: float, what: Literal["batch", "length"]) -> int:
    """The largest batch or length, the rest of `plan` as it is, whose peak is at most `card` bytes, and at most `MOST`.

    It is 0 if not even 1 fits. The peak is made of terms a + b·value, their sums and their maxima, and so is convex in
    the value: what a straight line between two peaks allows does fit, and the search begins there.
    """

    def peak(value: int) -> int:
        return budget(dataclasses.replace(plan, **{what: value})).peak.total

    least, most = peak(1), peak(MOST)
    if least > card:
        return 0
    if most <= card:
        return MOST
    fits, step = 1 + int((card - least) * (MOST - 1) // (most - least)), 1
    while peak(fits + step) <= card:
        fits, step = fits + step, 2 * step
    between = range(fits + 1, fits + step)
    return fits + bisect.bisect_right(between, card, key=peak)


def weight_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of the weights and of their scales.

    A matrix of n weights has n·w bytes, or n codes in int8 and a float32 scale for every output, or n/2 bytes in NF4
    and, for each 64 weights, a float32 scale; double quantized that is one byte, and a float32 scale for 256 of those.
    Embeddings, norms and, unless the plan says otherwise, the head keep w bytes a number.

    Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339; 2023, https://arxiv.org/abs/2305.14314.
    """
    config, matrices = plan.config, plan.matrices()
    in_matrices = sum(matrices.elements())
    rest = config.num_parameters - in_matrices
    if not plan.is_quantized:
        return config.num_parameters * plan.width, 0
    if plan.weights == "int8":
        outputs = config.num_layers * sum(out for _, out in plan.config.projections.values())
        return in_matrices + rest * plan.width, 4 * (outputs + config.vocab_size * plan.head_is_quantized)
    codes = sum(count * math.ceil(size / 2) for size, count in matrices.items())
    scales = 0
    for size, count in matrices.items():
        blocks = math.ceil(size / _BLOCK)
        doubly = blocks + 4 * math.ceil(blocks / _OUTER_BLOCK) + _CODEBOOKS
        scales += count * (4 * (blocks + _LEVELS) if plan.weights == "nf4" else doubly)
    return codes + rest * plan.width, scales


def optimizer_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of AdamW's state on the card, and of what is paged.

    PyTorch's AdamW keeps two numbers of the trained tensor's own dtype for each of its own. bitsandbytes' keeps two
    float32 numbers or, in 8 bits, two bytes and two float32 scales for 256 of them (tensors below 4,096 numbers stay in
    float32). Its paged optimizers page the state of tensors of 100,000 numbers or more, but not its scales.

    Source: Dettmers et al. 2021, https://arxiv.org/abs/2110.02861.
    """
    on_card, paged = (_STATE_MAPS if plan.optimizer.endswith("8-bit") else 0), 0
    for size, count in plan.trained().items():
        if plan.optimizer == "AdamW":
            on_card += count * (2 * size * _trained_width(plan) + 4)  # and the number of the step
            continue
        quantized = plan.optimizer.endswith("8-bit") and size >= _LEAST_QUANTIZED_STATE
        state = count * 2 * size * (1 if quantized else 4)
        if quantized:
            on_card += count * 8 * math.ceil(size / _STATE_BLOCK)
        if plan.optimizer.startswith("paged") and size >= _LEAST_PAGED_STATE and plan.on_cuda:
            paged += state
        else:
            on_card += state
    return on_card, paged


def building_bytes(plan: Plan) -> int:
    """The most that is held while the model is built and given its adapters, before the first step.

    Weights in few bits are made a block at a time, (2·D·(H + G)·d + 3·D·F)·w bytes that are quantized before the next
    block is made, and a quantized head, V·D·w, after them. A tied head has as many of its own until it is tied.
    Adapters come when all that is gone.
    """
    config = plan.config
    block = sum(inputs * outputs for inputs, outputs in config.projections.values())
    has_own = plan.head_is_quantized or config.tie_embeddings
    passing = plan.width * max(block * plan.is_quantized, config.vocab_size * config.d_model * has_own)
    return sum(weight_bytes(plan)) + max(passing, _adapters(plan)["adapters"])


def kv_cache_bytes(plan: Plan) -> int:
    """2·L·N·G·d·w: keys and values of every token in every block."""
    config = plan.config
    return 2 * config.num_layers * plan.tokens * config.num_kv_heads * config.head_dim * plan.width


def _reading_a_prompt(plan: Plan) -> tuple[Moment, ...]:
    """What is held in a block, where its feed-forward network holds most, and at the head.

    Until then the block has its input and its caller's, the norm's output and heads. The network adds gate, up,
    silu(gate) and their product or, once silu(gate) is gone, its output and a matrix that is unpacked for it.
    """
    config, N, w = plan.config, plan.tokens, plan.width
    D, F, V = config.d_model, config.ffn_dim, config.vocab_size
    held = {**_weights(plan), "KV cache": kv_cache_bytes(plan), **_workspace(plan)}
    table = 4 * plan.length * config.head_dim
    attended = N * (3 * D + config.num_heads * config.head_dim) * w
    fed = max(4 * N * F * w, N * (3 * F + D) * w + _unpacked_in_block(plan))
    temporary = {
        "a block that reads the prompt": {"temporary tensors": table + attended + fed},
        "the head after the prompt": {
            "temporary tensors": table + N * D * w + _unpacked_head(plan),
            "logits and loss": plan.batch * V * w,
        },
    }
    parts = {name: {**held, **made} for name, made in temporary.items()}
    return tuple(Moment(name, {part: now[part] for part in PARTS if now.get(part)}) for name, now in parts.items())


def _weights(plan: Plan) -> dict[Part, int]:
    weights, scales = weight_bytes(plan)
    return {"weights": weights, "scales": scales}


def _adapters(plan: Plan) -> dict[Part, int]:
    return {"adapters": 4 * sum(plan.trained().elements()) if plan.method == "LoRA" else 0}


def _workspace(plan: Plan) -> dict[Part, int]:
    return {"workspace": _WORKSPACE if plan.on_cuda else 0}


def _trained_width(plan: Plan) -> int:
    return plan.width if plan.trains_everything else 4


def _gradient_bytes(plan: Plan) -> int:
    return sum(plan.trained().elements()) * _trained_width(plan)


def _block_gradients(plan: Plan) -> tuple[int, int]:
    """Bytes of the gradients of a block, and of its last matrix, whose gradient comes first."""
    if plan.trains_everything:
        sizes = {name: inputs * outputs for name, (inputs, outputs) in plan.config.projections.items()}
        norms = 2 * plan.config.d_model
    else:
        sizes = {name: plan.rank * (inputs + outputs) for name, (inputs, outputs) in plan.adapted().items()}
        norms = 0
    width = _trained_width(plan)
    return width * (sum(sizes.values()) + norms), width * sizes.get("down_proj", 0)


def _temporary_in_block(plan: Plan) -> int:
    """At their most, in the feed-forward network: two gradients of width F more than are freed, one of D, a matrix."""
    return plan.tokens * (2 * plan.config.ffn_dim + plan.config.d_model) * plan.width + _unpacked_in_block(plan)


def _unpacked_in_block(plan: Plan) -> int:
    return plan.config.d_model * plan.config.ffn_dim * plan.width if plan.is_quantized else 0


def _unpacked_head(plan: Plan) -> int:
    return plan.config.vocab_size * plan.config.d_model * plan.width if plan.head_is_quantized else 0
