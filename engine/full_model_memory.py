"""Where the memory of a training step goes with any of the techniques on, by arithmetic, in float32.

    made = step_memory(Step(Model(config), batch=8, length=128))
    made.peak.total, made.peak.parts    # bytes, and of what

The forward pass is counted tensor by tensor, as `engine.saved_activations` does for what `engine.memory_budget` knows,
which is neither mixtures of adapters nor attention with all its weights, nor a model that learns around frozen
matrices. Several moments of a step are counted, and the fullest is the peak. Needs no torch.

It is exact for what is held and saved on a CPU. On CUDA other functions save other things: norms less, mixtures less of
what chooses and gates (`_saved_by_mixture`), FlashAttention copies in half precision too. cuBLAS's workspace, which a
process has once, is left out, and so is what the allocator rounds up.

Legend: N = batch · length tokens, T tokens of a text, L layers, D model width, F feed-forward width, H query heads,
G key/value heads, d head width, V vocabulary, R rank, E experts, K chosen per token, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from engine.full_model_cost import (
    WIDTH,
    Matrix,
    Model,
    Wants,
    adapter_numbers,
    model_bytes,
    parameters,
    router_numbers,
    takes_all_experts,
)

Part = Literal[
    "weights",
    "scales",
    "adapters",
    "routers",
    "optimizer state",
    "gradients",
    "activations",
    "logits and loss",
    "temporary tensors",
]

PARTS: dict[Part, str] = {
    "weights": "embeddings, norms and the layers' matrices, these in 4 bits if they are quantized",
    "scales": "what 4-bit codes are multiplied by: a byte for every block of 64 weights, 4 for every 256 blocks, and "
    "codebooks of about 1 kB a matrix",
    "adapters": "A and B of every adapter, those of experts included",
    "routers": "who gets the token: experts times inputs of a mixture, and the bias that keeps experts busy",
    "optimizer state": "AdamW's two running means for every trained number, and a step's number for every tensor",
    "gradients": "one number for every trained one, from where the backward pass has reached it",
    "activations": "what the forward pass keeps of every token for the backward pass",
    "logits and loss": "a score for every token and every word of the vocabulary, its logarithm and its gradient",
    "temporary tensors": "gradients of activations, attention's weights on their way, matrices unpacked for a product",
}
"""Everything that takes memory, in the order in which it is stacked, and what it is."""

_ID = 8  # bytes of a token's number
_STEP_NUMBER = 4  # bytes beside AdamW's means, of every tensor


@dataclass(frozen=True)
class Step:
    """A training step: forward, backward, AdamW.

    Args:
        model: that learns.
        batch: texts at once.
        length: T, tokens of a text.
        on_cuda: else a CPU.
    """

    model: Model
    batch: int
    length: int
    on_cuda: bool = False

    @property
    def tokens(self) -> int:
        """N."""
        return self.batch * self.length


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
class StepMemory:
    """A step's memory.

    Args:
        moments: in the order of time.
        saved: bytes that the forward pass leaves for the backward pass, the loss's included.
    """

    moments: tuple[Moment, ...]
    saved: int

    @property
    def peak(self) -> Moment:
        """The moment that holds most."""
        return max(self.moments, key=lambda moment: moment.total)


def step_memory(step: Step) -> StepMemory:
    """The memory of one step, not the first one: the optimizer's state is there from the start."""
    model, config, N = step.model, step.model.config, step.tokens
    D, V, L = config.d_model, config.vocab_size, config.num_layers
    counted = parameters(model)
    learning = sum(count.learning for count in counted.values())
    held: dict[Part, int] = {**model_bytes(config), "optimizer state": optimizer_bytes(model)}

    first, other = _saved_by_layer(step, True), _saved_by_layer(step, False)
    head = _saved_by_norm(step) + model.rest_learns * N * D * WIDTH
    body = first + (L - 1) * other + _rotary_table(step)
    last = first if L == 1 else other
    scores = N * V * WIDTH
    embeddings = V * D * WIDTH * model.rest_learns
    to_be_added = embeddings if config.tie_embeddings else 0  # the embedding's gradient to the head's, for a sum
    others = (L - 1) * _layer_gradients(model)

    def moment(name: str, parts: dict[Part, int]) -> Moment:
        now = {**held, **parts, "logits and loss": parts.get("logits and loss", 0) + 2 * _ID * N}  # and the batch
        return Moment(name, {part: now[part] for part in PARTS if now.get(part)})

    moments = (
        moment(
            "attention of the last layer",
            {
                "activations": body - _saved_by_network(step, Wants.of(model, L == 1)),
                "temporary tensors": 0 if config.use_flashattention else WIDTH * N * config.num_heads * step.length,
            },
        ),
        moment("the end of the forward pass", {"activations": body + head, "logits and loss": 2 * scores}),
        moment("the gradient of the loss", {"activations": body + head, "logits and loss": 3 * scores}),
        moment(
            "the backward pass of the head",
            {
                "activations": body + head,
                "logits and loss": scores,
                "gradients": embeddings,
                "temporary tensors": N * D * WIDTH,
            },
        ),
        *(
            moment(f"{name} of the last layer", parts)
            for name, parts in _backward(step, L == 1, body - last, embeddings)
        ),
        *(
            moment(f"{name} of the first layer", parts)
            for name, parts in _backward(step, True, _rotary_table(step), embeddings + others)
        ),
        moment(
            "the end of the backward pass",
            {
                "gradients": learning * WIDTH + to_be_added,
                "temporary tensors": max(N * D * WIDTH, to_be_added) if model.rest_learns else 0,
            },
        ),
        moment("the update", {"gradients": learning * WIDTH}),
    )
    return StepMemory(moments, body + head + scores)


def _backward(step: Step, first: bool, before: int, gradients: int) -> Iterator[tuple[str, dict[Part, int]]]:
    """The moments of a layer's backward pass.

    Args:
        step: that is taken.
        first: whether the layer is the first.
        before: bytes that the layers before it have saved.
        gradients: bytes of those that are there already.
    """
    model, config, N = step.model, step.model.config, step.tokens
    wants = Wants.of(model, first)
    D, F, (down,) = config.d_model, config.ffn_dim, model.named("down_proj")
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections, attention = _saved_by_projections(step, wants), _saved_by_attention(step) * wants.attention
    layer = before + projections + attention + _saved_by_network(step, wants)
    of_down = _saved_by_down(step, wants)
    unpacked = down.size * down.in_4_bits
    yield (
        "the backward pass of the network's last matrix",
        {
            "activations": layer,
            "gradients": gradients + _matrix_gradients(model, "down_proj"),
            "temporary tensors": WIDTH * (N * (F + D) + unpacked),
        },
    )
    yield (
        "the backward pass of gate and up",
        {
            "activations": layer - of_down,
            "gradients": gradients + _matrix_gradients(model, "down_proj"),
            "temporary tensors": WIDTH * N * (3 * F + D),
        },
    )
    network = _matrix_gradients(model, "o_proj", "gate_proj", "up_proj", "down_proj")
    if config.use_flashattention:
        kept, temporary = attention, N * (D + 2 * queries + 2 * keys)
    else:
        (output,) = model.named("o_proj")
        kept = attention - WIDTH * N * queries * (2 + (output.learns or output.adapter is not None))
        temporary = N * (D + queries + 2 * config.num_heads * step.length)
    yield (
        "the backward pass of attention",
        {
            "activations": before + projections + kept * wants.attention,
            "gradients": gradients + network,
            "temporary tensors": WIDTH * temporary,
        },
    )


def optimizer_bytes(model: Model) -> int:
    """AdamW's two numbers for each that learns, and for every tensor the number of the step."""
    config = model.config
    learning = sum(count.learning for count in parameters(model).values())
    experts = {"LoRA": 2, "mixture": 2 * config.num_experts + 1, None: 0}
    of_layer = sum(experts[matrix.adapter] + matrix.learns for matrix in model.matrices) + 2 * model.rest_learns
    rest = model.rest_learns * (2 if config.tie_embeddings else 3)  # embedding, last norm, a head of its own
    return 2 * WIDTH * learning + _STEP_NUMBER * (config.num_layers * of_layer + rest)


def _layer_gradients(model: Model) -> int:
    """Bytes of the gradients of a layer."""
    norms = WIDTH * 2 * model.config.d_model * model.rest_learns
    return _matrix_gradients(model, *model.config.projections) + norms


def _matrix_gradients(model: Model, *names: str) -> int:
    """Bytes of the gradients of some matrices, their adapters and their routers."""
    numbers = sum(
        matrix.size * matrix.learns + adapter_numbers(model.config, matrix) + router_numbers(model.config, matrix)
        for matrix in model.named(*names)
    )
    return WIDTH * numbers


def _saved_by_layer(step: Step, first: bool) -> int:
    """What one layer keeps for its backward pass."""
    wants = Wants.of(step.model, first)
    saved = _saved_by_projections(step, wants)
    if wants.attention:
        saved += _saved_by_attention(step)
    return saved + _saved_by_network(step, wants)


def _saved_by_projections(step: Step, wants: Wants) -> int:
    """The norm before queries, keys and values, what these read, and x·A and a copy of A of what is adapted."""
    model, config, N = step.model, step.model.config, step.tokens
    projections = model.named("q_proj", "k_proj", "v_proj")
    saved = _saved_by_norm(step) if wants.stream else 0
    if any(matrix.learns or matrix.adapter for matrix in projections):
        saved += N * config.d_model * WIDTH
    return saved + _saved_by_adapters(step, projections, together=True)


def _saved_by_attention(step: Step) -> int:
    """Queries and keys, values, the output, and what attention itself keeps; and what the output projection reads.

    FlashAttention keeps a number for each token and head. Standard attention keeps the H·T weights of each token, and
    copies of queries, keys, values and output in the order of its products.
    """
    model, config, N = step.model, step.model.config, step.tokens
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    (output,) = model.named("o_proj")
    reads = output.learns or output.adapter is not None
    if config.use_flashattention:
        numbers = 2 * (queries + keys) + config.num_heads
        half = (2 * queries + 2 * keys) / 2 if step.on_cuda else 0  # what the kernel reads and writes, in 16 bits
        saved = round(WIDTH * N * (numbers + half))
    else:
        repeated = queries if keys != queries else 0  # keys that several heads share, one copy a head
        numbers = queries + keys + repeated + 4 * queries + config.num_heads * step.length
        saved = WIDTH * N * (numbers + reads * queries)
    return saved + _saved_by_adapters(step, (output,), together=False)


def _saved_by_network(step: Step, wants: Wants) -> int:
    """The norm before the feed-forward network, what gate and up read, they themselves and silu(gate), and the rest."""
    model, config, N = step.model, step.model.config, step.tokens
    reading = model.named("gate_proj", "up_proj")
    saved = _saved_by_norm(step) if wants.middle else 0
    if any(matrix.learns or matrix.adapter for matrix in reading):
        saved += N * config.d_model * WIDTH
    if wants.gated:
        saved += 3 * N * config.ffn_dim * WIDTH
    saved += _saved_by_adapters(step, reading, together=True)
    saved += sum(_saved_by_mixture(step, matrix, wants.middle) for matrix in reading if matrix.adapter == "mixture")
    return saved + _saved_by_down(step, wants)


def _saved_by_down(step: Step, wants: Wants) -> int:
    """What the network's last matrix reads, and its adapter."""
    (down,) = step.model.named("down_proj")
    saved = step.tokens * step.model.config.ffn_dim * WIDTH if down.learns or down.adapter else 0
    if down.adapter == "mixture":
        return saved + _saved_by_mixture(step, down, wants.gated)
    return saved + _saved_by_adapters(step, (down,), together=False)


def _saved_by_norm(step: Step) -> int:
    """An RMSNorm keeps its input and a root a token; unfused, what a trained gain multiplies as well."""
    D, trained = step.model.config.d_model, step.model.rest_learns and not step.on_cuda
    return WIDTH * step.tokens * (D + 1 + D * trained)


def _saved_by_adapters(step: Step, matrices: tuple[Matrix, ...], together: bool) -> int:
    """x·A of each, and of those that read the same a copy of all A side by side."""
    config = step.model.config
    adapted = [matrix for matrix in matrices if matrix.adapter == "LoRA"]
    copies = sum(matrix.inputs for matrix in adapted) if together and len(adapted) > 1 else 0
    return WIDTH * config.lora_rank * (step.tokens * len(adapted) + copies)


def _saved_by_mixture(step: Step, matrix: Matrix, reads_gradient: bool) -> int:
    """What chooses and gates, x·A on its way through the gates, all A and all B side by side, in float32.

    all experts, on CUDA  `choose_in_one_launch`: logits N·E, chosen experts N·K in int64, gates N·K
                          `gate_columns`: u = x·A, N·E·R, and the choice again; the product with B: its result, N·E·R
    all experts           logits, twice their log-sigmoid's, a table of gates, N·E each, a mask of N·E bytes; what is
                          looked up, scattered and divided, N·K each; x·A four times, N·E·R each
    grouped by expert     tables of the router as before; N·K rows of x, A and B in an order of their own

    The router's weight and A are kept for the gradient of x.
    """
    config, N = step.model.config, step.tokens
    E, K, R = config.num_experts, config.top_k, config.lora_rank
    factors = WIDTH * (E * R * matrix.outputs + reads_gradient * (E + E * R) * matrix.inputs)
    tables = 4 * WIDTH * N * E + N * E
    if not takes_all_experts(config, matrix, N, step.on_cuda):
        rows = matrix.inputs + 4 * R + matrix.outputs
        return factors + tables + N * K * (3 * _ID + 2 * WIDTH + WIDTH * rows) + 4 * E
    if step.on_cuda:
        return factors + N * (WIDTH * E + K * (_ID + WIDTH) + 2 * WIDTH * E * R)
    return factors + tables + N * (WIDTH * E + K * (2 * _ID + WIDTH) + 4 * WIDTH * E * R)


def _rotary_table(step: Step) -> int:
    return WIDTH * step.length * step.model.config.head_dim
