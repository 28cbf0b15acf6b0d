"""Parameters of the FlashAttention lab: what is allowed, what is said where it is not, and no torch for any of it."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from engine.errors import InputError
from engine.experiments import (
    _flash,
    flash_accuracy,
    flash_decode,
    flash_online,
    flash_roofline,
    flash_speed,
    flash_tests,
    flash_tiles,
    parse,
)

NAMES = ("speed", "tiles", "online", "roofline", "accuracy", "decode", "tests")


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_allowed_and_every_knob_is_explained(name):
    params = parse(f"flash_{name}", {})
    assert params.memory_bytes() >= 0
    for field, info in type(params).model_fields.items():
        assert info.title, field
        assert info.description, field
        assert info.description.endswith("."), field


def test_the_web_process_needs_no_torch_for_them():
    code = "import sys; from engine.experiments import parse\n"
    code += "".join(f"parse('flash_{name}', {{}}).memory_bytes()\n" for name in NAMES)
    assert (
        subprocess.run([sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], check=False).returncode == 0
    )


def test_backends_are_those_of_the_engine():
    from engine.flash.backends import BACKENDS

    assert set(_flash.BACKENDS) == set(BACKENDS)


@pytest.mark.parametrize("model", [flash_speed.Params, flash_roofline.Params])
@pytest.mark.parametrize("longest", [256, 2048, 65536])
def test_lengths_double_from_128_to_the_longest(model, longest):
    lengths = model(max_length=longest).lengths
    assert (lengths[0], lengths[-1]) == (128, longest)
    assert all(after == 2 * before for before, after in itertools.pairwise(lengths))


def test_constant_tokens_shrink_the_batch_and_a_fixed_batch_stays():
    constant = flash_speed.Params(tokens="constant tokens", batch=2, max_length=4096)
    assert {length * constant.batch_at(length) for length in constant.lengths} == {2 * 4096}
    fixed = flash_speed.Params(batch=2, max_length=4096)
    assert {fixed.batch_at(length) for length in fixed.lengths} == {2}


def test_cache_lengths_double_and_bytes_follow_the_formula():
    params = flash_decode.Params(max_length=8192, heads=8, kv_heads=2, head_dim=64, batch=3, dtype="bfloat16")
    assert params.lengths == (1024, 2048, 4096, 8192)
    assert params.cache_bytes(4096) == 2 * 3 * 2 * 4096 * 64 * 2


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "flash_speed",
            {"max_length": 3000},
            "The longest sequence is 3,000 tokens, and lengths double from 128: choose 2,048 or 4,096.",
        ),
        ("flash_speed", {"max_length": 10**6}, "max_length is 1000000: input should be less than or equal to 65536."),
        ("flash_speed", {"head_dim": 60}, "head_dim is 60: input should be a multiple of 8."),
        ("flash_roofline", {"max_length": 300}, "choose 256 or 512."),
        ("flash_decode", {"max_length": 5000}, "choose 4,096 or 8,192."),
        (
            "flash_decode",
            {"heads": 8, "kv_heads": 3},
            "8 heads cannot share 3 key/value heads in equal groups: choose one of 1, 2, 4, 8.",
        ),
        ("flash_decode", {"heads": 2, "kv_heads": 4}, "choose one of 1, 2."),
        ("flash_tiles", {"length": 8, "row": 8}, "There is no row 8 among 8 tokens: choose one from 0 to 7."),
        ("flash_online", {"scores": "1, 2, abc"}, "Score 3 ('abc') is no number: write it like 1.5 or -2."),
        ("flash_online", {"scores": "1, inf"}, "Score 2 ('inf') is not finite: write a number like 1.5 or -2."),
        ("flash_online", {"scores": "nan 1"}, "Score 1 ('nan') is not finite: write a number like 1.5 or -2."),
        ("flash_online", {"scores": "1 2e4"}, "Score 2 (2e4) is out of range: type numbers from -10,000 to 10,000."),
        ("flash_online", {"scores": " , "}, "There are no scores: type a few numbers"),
        ("flash_online", {"scores": "1 " * 65}, "There are 65 scores, and 64 can be drawn: leave some out."),
        (
            "flash_online",
            {"scores": "1, -400", "factor": 1000},
            "Score 2 (-400) times 1000 is more than float16 can hold (65,504) even before exp",
        ),
        ("flash_online", {"scores": "x" * 1000}, f"Score 1 ('{'x' * 20}…') is no number"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(name, values, message):
    with pytest.raises(InputError) as caught:
        parse(name, values)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["1,2.5,-3", "1 2.5 −3", "1; 2.5;\n-3", "1, 2.5, -3,"])
def test_scores_may_be_parted_by_commas_spaces_and_semicolons(text):
    assert flash_online.Params(scores=text).values() == [1, 2.5, -3]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_scores_are_the_seeds_own(seed):
    params = flash_online.Params(scores=" Random ", length=20, seed=seed)
    assert len(params.values()) == 20
    assert params.values() == params.values()
    assert params.values() != flash_online.Params(scores="random", length=20, seed=seed + 1).values()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_largest_number_of_a_format_is_what_numpy_says(dtype):
    assert flash_online.LARGEST[dtype] == np.finfo(dtype).max


def test_a_longer_reference_asks_for_more_memory():
    short, long = (flash_accuracy.Params(length=length).memory_bytes() for length in (512, 4096))
    assert long == 64 * short


def test_checks_take_the_shape_of_the_page():
    shared = set(_flash.ShapeParams.model_fields)
    assert shared <= set(flash_tests.Params.model_fields) & set(flash_speed.Params.model_fields)
    assert flash_tiles.Params(on_chip=1.0).on_chip == 1.0


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 bytes"),
        (1000, "1,000 bytes"),
        (5.25 * 2**20, "5.25 MiB"),
        (1020 * 2**20, "1,020 MiB"),
        (2**30 - 1, "1 GiB"),
        (1500 * 2**30, "1,500 GiB"),
    ],
)
def test_bytes_are_written_without_powers_of_ten(nbytes, words):
    assert _flash.bytes_in_words(nbytes) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0"), (0.25, "0.25"), (1.5, "1.5"), (2.34e-4, "2.3 × 10⁻⁴"), (9.99e-4, "0.001"), (-3e-17, "−3 × 10⁻¹⁷")],
)
def test_small_numbers_are_written_as_people_write_them(value, words):
    assert _flash.number_in_words(value) == words
