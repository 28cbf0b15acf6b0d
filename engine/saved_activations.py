"""What the forward pass of a `Decoder` keeps for its backward pass, counted tensor by tensor.

Each function says what one part of the model saves, in bytes: with PyTorch's fused attention, in eager mode, a tensor
that several operations save counted once, parameters not at all. Needs no torch.

Legend: N tokens, D model width, F feed-forward width, H query heads, G key/value heads, d head width, R rank, w bytes
of a number that is computed with.
"""

from __future__ import annotations

from engine.training_plan import Plan


def saved_by_body(plan: Plan) -> int:
    """What the blocks and the rotary table keep: with checkpointing only each block's input, N·D."""
    config = plan.config
    table = 4 * plan.length * config.head_dim
    if plan.checkpointing:
        return config.num_layers * plan.tokens * config.d_model * plan.width + table
    return saved_by_block(plan, first=True) + (config.num_layers - 1) * saved_by_block(plan) + table


def saved_by_block(plan: Plan, first: bool = False) -> int:
    """Bytes that one block keeps for its backward pass.

    Trained in full it is, in numbers of w bytes a token, 4 D for both norms and what they read, 2·(H + G)·d for
    attention (queries, keys, values, output), 4 F for gate, up, silu(gate) and their product; and in float32 the norms'
    2 and attention's H. An adapted matrix keeps its input as a trained one does, and R numbers a token more; a frozen
    one keeps nothing. The `first` block of an adapted model reads embeddings that want no gradient.
    """
    config, N, w = plan.config, plan.tokens, plan.width
    D, F = config.d_model, config.ffn_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    learns = set(plan.config.projections) if plan.trains_everything else set(plan.adapted())
    int8 = plan.weights == "int8"  # bitsandbytes' layers keep every input that wants a gradient
    reads_gradient = plan.trains_everything or not first
    attends = reads_gradient or bool(learns & {"q_proj", "k_proj", "v_proj"})
    feeds = attends or "o_proj" in learns
    saved = 0
    if reads_gradient:
        saved += _saved_by_norm(plan)
    if learns & {"q_proj", "k_proj", "v_proj"} or (int8 and reads_gradient):
        saved += N * D * w
    if attends:
        saved += N * (2 * (queries + keys) * w + 4 * config.num_heads)
    elif "o_proj" in learns:
        saved += N * queries * w
    if feeds:
        saved += _saved_by_norm(plan)
    gates = feeds or bool(learns & {"gate_proj", "up_proj"})
    if learns & {"gate_proj", "up_proj"} or (int8 and feeds):
        saved += N * D * w
    if gates:
        saved += 3 * N * F * w
    if "down_proj" in learns or (int8 and gates):
        saved += N * F * w
    return saved + _saved_by_adapters(plan)


def _saved_by_norm(plan: Plan) -> int:
    """An RMSNorm keeps its input and a float32 root a token; unfused in float32, and what a trained gain multiplies."""
    N, D = plan.tokens, plan.config.d_model
    if plan.on_cuda:
        return N * (D * plan.width + 4)
    return N * (4 * D + 4 + (4 * D if plan.trains_everything else 0))


def _saved_by_adapters(plan: Plan) -> int:
    """x·A, R numbers a token, and copies of A and B where they are cast or put side by side."""
    adapted, w = plan.adapted(), plan.width
    saved = plan.tokens * plan.rank * w * len(adapted)
    if w < 4:
        return saved + w * sum(plan.rank * side for sides in adapted.values() for side in sides)
    for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if all(name in adapted for name in together):
            saved += w * plan.rank * plan.config.d_model * len(together)
    return saved


def saved_by_head(plan: Plan) -> int:
    """The last norm, and what a trained head reads."""
    keeps = plan.trains_everything or (plan.weights == "int8" and plan.head_is_quantized)
    return _saved_by_norm(plan) + (plan.tokens * plan.config.d_model * plan.width if keeps else 0)
