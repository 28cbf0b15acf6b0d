"""The MoE-LoRA lab without torch: parameters, sizes, and what is refused."""

import subprocess
import sys

import pytest

from engine.errors import InputError
from engine.experiments import _lora, parse
from engine.experiments._moe_lora import LEARNING_RATES, ROLES, TASK_NAMES, Try, best_rates, tried_rates

NAMES = ("moe_lora", "moe_lora_tests", "moe_lora_split")


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_allowed_and_every_knob_is_explained(name):
    params = parse(name, {})
    assert params.memory_bytes() >= 0
    for field, info in type(params).model_fields.items():
        assert info.title, field
        assert info.description.endswith("."), field


def test_the_web_process_needs_no_torch_for_them():
    code = "import sys; from engine.experiments import parse\n"
    code += "".join(f"parse('{name}', {{}}).memory_bytes()\n" for name in NAMES)
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"experts": 2, "top_k": 3}, "take 3 experts of 2: choose at most 2"),
        ({"experts": 8, "rank": 16}, "8 experts of rank 16 have the parameters of one LoRA of rank 13[0-9]"),
        ({"experts": 0}, "(?i)experts"),
        ({"experts": 9}, "(?i)experts"),
        ({"rank": 0}, "(?i)rank"),
        ({"rank": 17}, "(?i)rank"),
        ({"top_k": 0}, "(?i)top_k|K"),
        ({"kind": "expert choice"}, "(?i)kind|routing"),
        ({"bias_rate": -0.1}, "(?i)bias"),
        ({"bias_rate": "nan"}, "(?i)bias"),
        ({"learning_rate": 0}, "(?i)learning"),
        ({"learning_rate": "nan"}, "(?i)learning"),
        ({"steps": 0}, "(?i)steps"),
        ({"batch_size": 65}, "(?i)batch"),
        ({"seed": -1}, "(?i)seed"),
        ({"targets": "all of them"}, "(?i)targets|projections"),
        ({"model": "gpt-2"}, "(?i)model"),
        ({"shared_a": "perhaps"}, "(?i)shared|A for all"),
    ],
)
def test_wrong_values_get_one_sentence(values, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        parse("moe_lora", values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"similarity": 1},
        {"similarity": "nan"},
        {"bias_rate": 2},
        {"kind": "noisy"},
        {"learning_rate": 0},
        {"rounds": 0},
        {"others": 21},
        {"seed": 10_000},
    ],
)
def test_wrong_values_of_the_two_inputs_get_one_sentence(values):
    with pytest.raises(InputError) as error:
        parse("moe_lora_split", values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["storyteller", "smollm2-135m"])
@pytest.mark.parametrize("targets", list(_lora.TARGETS))
@pytest.mark.parametrize(("experts", "rank", "top_k"), [(1, 1, 1), (4, 4, 1), (4, 4, 2), (8, 8, 3)])
@pytest.mark.parametrize("shared_a", [False, True])
def test_the_plain_loras_come_as_close_as_a_rank_allows(model, targets, experts, rank, top_k, shared_a):
    params = parse(
        "moe_lora",
        {"model": model, "targets": targets, "experts": experts, "rank": rank, "top_k": top_k, "shared_a": shared_a},
    )
    mixture, alike, thrifty = (params.size(role) for role in ROLES)
    step = params.plain(1)
    assert abs(alike.trainable - mixture.trainable) <= step.trainable / 2 or alike.rank == 1
    assert abs(thrifty.flops - mixture.flops) <= step.flops / 2 or thrifty.rank == 1
    assert alike.trainable == _lora.adapter_parameters(_lora.shape_of(model), alike.rank, targets).total
    if experts > top_k:
        assert thrifty.rank <= alike.rank
    if experts == 1:
        assert mixture.trainable > step.trainable * rank  # the router counts


def test_more_experts_are_more_numbers_but_only_the_router_more_flops():
    few, many = parse("moe_lora", {"experts": 2}).mixture(), parse("moe_lora", {"experts": 4}).mixture()
    params = parse("moe_lora", {"experts": 2})
    router = 2 * 6 * sum(inputs for inputs, _ in params.sides) * 2
    assert many.flops - few.flops == router
    assert many.trainable == 2 * few.trainable


@pytest.mark.parametrize("field", ["experts", "rank", "batch_size"])
def test_more_of_it_takes_more_memory(field):
    sizes = [parse("moe_lora", {field: value}).memory_bytes() for value in (2, 4, 8)]
    assert sizes == sorted(set(sizes))


def test_each_run_has_its_own_learning_rate_unless_one_is_given():
    own, given = parse("moe_lora", {}), parse("moe_lora", {"learning_rate": 0.002})
    assert {given.rate(role) for role in ROLES} == {0.002}
    assert all(own.rate(role) > 0 for role in ROLES)


def test_own_learning_rates_are_chosen_by_one_rule_from_the_same_tries():
    tried = tried_rates()
    assert best_rates(tried.tries) == LEARNING_RATES
    tries = [{(one.learning_rate, one.seed) for one in tried.tries if one.role == role} for role in ROLES]
    assert tries[0] == tries[1] == tries[2]
    assert len(tried.tries) == sum(map(len, tries))
    rates = sorted({rate for rate, _ in tries[0]})
    assert all(rates[0] < rate < rates[-1] for rate in LEARNING_RATES.values())  # what is best may not lie outside
    assert parse("moe_lora", {}).seed not in {seed for _, seed in tries[0]}
    assert parse("moe_lora", {}).steps == tried.steps


def test_most_right_answers_win_and_then_the_lower_loss():
    tries = [
        Try(role, rate, seed, right, loss)
        for role in ROLES
        for rate, seed, right, loss in ((0.1, 0, 0.5, 1.0), (0.1, 1, 0.5, 1.0), (0.2, 0, 0.9, 3.0), (0.2, 1, 0.0, 3.0),
                                        (0.3, 0, 0.4, 0.5), (0.3, 1, 0.6, 0.9))
    ]  # fmt: skip
    assert set(best_rates(tries).values()) == {0.3}


def test_the_tasks_have_names():
    assert len(set(TASK_NAMES)) == 4
