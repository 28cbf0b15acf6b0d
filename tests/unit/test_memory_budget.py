"""The arithmetic of memory says what building, training and saving really take."""

import dataclasses
import subprocess
import sys

import pytest

from engine.architecture import ModelConfig
from engine.errors import InputError
from engine.experiments import _lora
from engine.memory_budget import GB, MOST, PARTS, budget, kv_cache_bytes, largest, optimizer_bytes, weight_bytes
from engine.memory_measurement import build, measure_step
from engine.model import Decoder, KVCache
from engine.training_plan import Plan

GROUPED = ModelConfig(d_model=128, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=320, vocab_size=1000)
OWN_HEAD = GROUPED.model_copy(update={"tie_embeddings": False})
UNGROUPED = ModelConfig(d_model=64, num_layers=2, num_heads=2, ffn_dim=192, vocab_size=300, tie_embeddings=False)
CONFIGS = [GROUPED, OWN_HEAD, UNGROUPED]
TARGETS = [*_lora.TARGETS.values()]
FULL, LORA = "full fine-tuning", "LoRA"

ON_THE_CPU = [
    Plan(config, method, weights, rank=8, batch=2, length=96, on_cuda=False)
    for config in CONFIGS
    for method, weights in (
        (FULL, "float32"),
        (FULL, "bfloat16"),
        (LORA, "float32"),
        (LORA, "bfloat16"),
        (LORA, "nf4"),
        (LORA, "nf4, double quantized"),
    )
] + [
    Plan(OWN_HEAD, LORA, weights, 4, targets, batch=2, length=96, on_cuda=False)
    for targets in TARGETS
    for weights in ("float32", "bfloat16", "nf4")
]


def name(plan):
    tied = "tied" if plan.config.tie_embeddings else "own head"
    return f"{plan.method}-{plan.weights}-{plan.config.d_model} {tied}-{len(plan.targets)} targets"


def measured(plan):
    return measure_step(plan, *build(plan, "cpu"), "cpu")


@pytest.mark.parametrize("plan", ON_THE_CPU, ids=name)
def test_every_category_is_what_a_real_step_holds(plan):
    """Saved tensors are seen by autograd's own hooks, the peak by the profiler; nothing of the step is assumed."""
    made, found = budget(plan), measured(plan)
    assert found.model == sum(weight_bytes(plan)) + made.peak.parts.get("adapters", 0)
    assert found.optimizer == optimizer_bytes(plan)[0]
    assert found.gradients == made.moments[-1].parts["gradients"]
    assert made.saved == pytest.approx(found.saved, rel=0.005)
    assert made.peak.total == pytest.approx(found.peak, rel=0.02)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("method", [FULL, LORA])
@pytest.mark.parametrize(("batch", "length"), [(1, 64), (3, 160)])
def test_the_peak_with_checkpointing(config, method, batch, length):
    plan = Plan(config, method, "float32", 8, batch=batch, length=length, checkpointing=True, on_cuda=False)
    assert budget(plan).peak.total == pytest.approx(measured(plan).peak, rel=0.04)


@pytest.mark.parametrize("optimizer", ["AdamW 8-bit", "paged AdamW", "paged AdamW 8-bit"])
@pytest.mark.parametrize("method", [FULL, LORA])
def test_the_state_of_other_optimizers(optimizer, method):
    plan = Plan(OWN_HEAD, method, "bfloat16", 64, batch=1, length=64, optimizer=optimizer, on_cuda=False)
    assert optimizer_bytes(plan) == (measured(plan).optimizer, 0)


@pytest.mark.parametrize("config", CONFIGS)
def test_int8_weights_and_their_scales(config):
    plan = Plan(config, LORA, "int8", 8, batch=1, length=64, on_cuda=False)
    assert measured(plan).model == sum(weight_bytes(plan)) + 4 * sum(plan.trained().elements())


@pytest.mark.parametrize(("way", "method"), [("full, Decoder", FULL), ("ours, Decoder", LORA)])
def test_a_billion_parameters_on_a_gpu(way, method):
    """The recorded peaks are of the LoRA lab's benchmark: another script, before these formulas were written."""
    recorded = _lora.recorded_steps().latest[way].peak_bytes
    shape = _lora.SHAPES[2]
    config = ModelConfig(
        d_model=shape.d_model,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        ffn_dim=shape.ffn_dim,
        vocab_size=shape.vocab_size,
        tie_embeddings=shape.tied,
    )
    predicted = budget(Plan(config, method, batch=4, length=1024)).peak
    assert predicted.total == pytest.approx(recorded, rel=0.01)
    assert predicted.name == "the gradient of the loss"


@pytest.mark.parametrize("config", CONFIGS)
def test_the_cache_is_what_a_cache_takes(config):
    plan = Plan(config, "generation", "float32", batch=3, length=40)
    cache = KVCache(Decoder(config), 3, 40)
    held = sum(layer._keys.nbytes + layer._values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(plan) == budget(plan).peak.parts["KV cache"] == held


@pytest.mark.parametrize("optimizer", ["paged AdamW", "paged AdamW 8-bit"])
def test_paged_state_is_not_on_the_card_and_only_large_tensors_are_paged(optimizer):
    width = 8 if optimizer == "paged AdamW" else 2
    config = _config(d_model=1024, vocab_size=2000)
    plan = Plan(config, FULL, optimizer=optimizer)
    on_card, paged = optimizer_bytes(plan)
    large = sum(size for size in plan.trained().elements() if size >= 100_000)
    assert paged == width * large
    assert 0 < on_card < 0.1 * paged
    assert budget(plan).paged == paged
    assert paged not in budget(plan).peak.parts.values()
    small = Plan(config, LORA, rank=4, optimizer=optimizer)
    assert optimizer_bytes(small)[1] == 0


@pytest.mark.parametrize("what", ["batch", "length"])
@pytest.mark.parametrize("method", [FULL, LORA, "generation"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("card", [0.02 * GB, 0.1 * GB, 1 * GB])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_largest_fits_and_one_more_does_not(what, method, checkpointing, card, config):
    plan = Plan(config, method, batch=2, length=48, checkpointing=checkpointing, on_cuda=False)
    most = largest(plan, card, what)
    assert most > 0

    def peak(value):
        return budget(dataclasses.replace(plan, **{what: value})).peak.total

    assert peak(most) <= card < peak(most + 1) or most == MOST


def test_nothing_fits_a_card_that_is_smaller_than_the_weights():
    assert largest(Plan(GROUPED, on_cuda=False), 1000, "batch") == 0


@pytest.mark.parametrize("change", [{"batch": 3}, {"length": 2000}, {"rank": 32}, {"weights": "float32"}])
@pytest.mark.parametrize("method", [FULL, LORA])
def test_more_of_anything_never_takes_less(change, method):
    plan = Plan(GROUPED, method, "bfloat16", 16, batch=2, length=512)
    assert budget(dataclasses.replace(plan, **change)).peak.total >= budget(plan).peak.total


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", TARGETS)
def test_checkpointing_saves_activations_and_nothing_else(config, targets):
    plan = Plan(config, LORA, targets=targets, batch=4, length=512)
    kept, again = (budget(dataclasses.replace(plan, checkpointing=on)).moments[0].parts for on in (False, True))
    assert again["activations"] < 0.35 * kept["activations"]
    assert {part: size for part, size in again.items() if part != "activations"} == {
        part: size for part, size in kept.items() if part != "activations"
    }


def test_fewer_bits_take_less_and_their_scales_are_counted():
    sizes = [sum(weight_bytes(Plan(_config(1024), weights=weights))) for weights in _FORMATS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    plan = Plan(_config(1024), weights="nf4, double quantized")
    matrices = sum(plan.matrices().elements())
    scales = weight_bytes(plan)[1]
    assert 4 + 8 * scales / matrices == pytest.approx(4.127, abs=0.006)


def test_weights_in_few_bits_cannot_be_trained():
    with pytest.raises(InputError, match="int8 cannot be trained"):
        Plan(GROUPED, FULL, "int8")


def test_every_part_is_explained_and_none_is_negative():
    for plan in ON_THE_CPU:
        for moment in budget(plan).moments:
            assert set(moment.parts) <= set(PARTS)
            assert all(size > 0 for size in moment.parts.values())


def test_it_needs_no_torch():
    code = "import sys, engine.memory_budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("method", "weights"), [(FULL, "bfloat16"), (LORA, "bfloat16"), (LORA, "nf4")])
def test_on_a_gpu(method, weights, checkpointing):
    plan = Plan(_config(1024), method, weights, batch=4, length=512, checkpointing=checkpointing)
    found = measure_step(plan, *build(plan, "cuda"), "cuda")
    assert budget(plan).peak.total == pytest.approx(found.peak, rel=0.1)


_FORMATS = ["float32", "bfloat16", "int8", "nf4", "nf4, double quantized"]


def _config(d_model, vocab_size=8000):
    heads = d_model // 64
    return ModelConfig(d_model=d_model, num_layers=4, num_heads=heads, vocab_size=vocab_size, tie_embeddings=False)
