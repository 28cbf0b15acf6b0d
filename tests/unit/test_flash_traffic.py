"""Bytes and operations: hand-counted examples, the papers' orders of growth, exactly the visible pairs."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine.flash.traffic import (
    Traffic,
    attention_flops,
    flash_backward_traffic,
    flash_traffic,
    held_matrices,
    standard_backward_traffic,
    standard_traffic,
    theorem,
    tile_sizes,
    visible_pairs,
)

size = st.integers(1, 40)


def test_total_is_both_ways():
    assert Traffic(3, 4).total == 7


class TestStandard:
    def test_forward_by_hand(self):
        """Tq 2, Tk 3, d 5: Q and O have 10 numbers, K and V 15, S and P 6."""
        assert standard_traffic(2, 3, 5, 4) == Traffic(read=4 * (10 + 15 + 6 + 6 + 15), written=4 * (6 + 6 + 10))

    def test_backward_by_hand(self):
        """dV: P dO, dP: dO V, dS: P dP, dQ: dS K, dK: dS Q."""
        read = (6 + 10) + (10 + 15) + (6 + 6) + (6 + 15) + (6 + 10)
        written = 15 + 6 + 6 + 10 + 15
        assert standard_backward_traffic(2, 3, 5, 2) == Traffic(read=2 * read, written=2 * written)


class TestFlash:
    def test_forward_by_hand(self):
        """Three query blocks of 2, 2 and 1 rows, two key blocks; half precision, so the logsumexp is twice as wide."""
        assert flash_traffic(5, 4, 8, 2, 2, 2) == Traffic(read=2 * 8 * (5 + 3 * 2 * 4), written=2 * 8 * 5 + 4 * 5)

    def test_forward_causal_by_hand(self):
        """Four tokens in tiles of two: the first query block reads one key block, the second two."""
        assert flash_traffic(4, 4, 8, 4, 2, 2, causal=True) == Traffic(read=32 * (4 + 2 * 6), written=32 * 4 + 16)

    def test_backward_causal_by_hand(self):
        """As above: three tiles, two of them their query block's first."""
        first, again = 2 * (3 * 32 + 4), 2 * (3 * 32 + 8)
        read = 32 * 8 + 2 * first + again
        assert flash_backward_traffic(4, 4, 8, 4, 2, 2, causal=True) == Traffic(
            read=read, written=32 * 8 + 4 * 4 + 3 * 2 * 32
        )

    def test_backward_in_half_precision_sums_queries_gradients_in_float32(self):
        """One query block, two key blocks: dQ is written once unfinished with 4 bytes, read, and finished with 2."""
        d, rows, keys = 8, 2, 4
        expected_read = 2 * d * 2 * keys + 2 * rows * (2 * 2 * d + 4) + rows * 2 * d + rows * 4 * (d + 1)
        expected_written = 2 * d * 2 * keys + rows * 4 + rows * d * (4 + 2)
        assert flash_backward_traffic(rows, keys, d, 2, 2, 2) == Traffic(expected_read, expected_written)

    @given(size, size, size, size, size, st.booleans())
    def test_larger_query_blocks_and_a_causal_mask_never_cost_more(self, queries, keys, d, block_q, block_k, causal):
        sizes = (queries, keys, d, 4)
        found = flash_traffic(*sizes, block_q, block_k, causal)
        assert flash_traffic(*sizes, 2 * block_q, block_k).total <= flash_traffic(*sizes, block_q, block_k).total
        assert found.total <= flash_traffic(*sizes, block_q, block_k).total

    @given(size, size, size, size)
    def test_one_tile_moves_every_tensor_once(self, queries, keys, d, extra):
        found = flash_traffic(queries, keys, d, 4, queries + extra, keys + extra)
        assert found == Traffic(4 * d * (queries + 2 * keys), 4 * (d * queries + queries))

    def test_a_block_that_sees_nothing_is_never_touched(self):
        """Six queries, two keys: only the last two see any."""
        assert flash_traffic(6, 2, 4, 4, 2, 2, causal=True) == flash_traffic(2, 2, 4, 4, 2, 2, causal=True)


class TestTheorem:
    def test_tile_sizes_are_the_papers(self):
        assert tile_sizes(64, 100_000, 4) == (64, 98)  # 25000 / 256 = 97.7
        assert tile_sizes(128, 100_000, 2) == (98, 98)
        assert tile_sizes(64, 16, 4) == (1, 1)

    def test_formula(self):
        assert theorem(1024, 64, 25_000) == pytest.approx(1024**2 * 64**2 / 25_000)
        assert theorem(1024, 64, 100_000, 4) == pytest.approx(4 * theorem(1024, 64, 25_000))

    def test_flash_traffic_grows_as_it_says(self):
        """With the larger of the paper's blocks for the queries: 2T²d / (M / 4d) = 8T²d² / M, and little besides."""
        for tokens, d, on_chip in itertools.product((8192, 32768), (32, 64, 128), (32_768, 65_536, 131_072)):
            rows, columns = tile_sizes(d, on_chip, 2)
            traffic = flash_traffic(tokens, tokens, d, 2, block_q=columns, block_k=rows)
            assert traffic.total / theorem(tokens, d, on_chip, 2) == pytest.approx(8, rel=0.13)

    def test_twice_the_chip_halves_the_traffic(self):
        """Standard attention's 4T² against 8T²d² / M is M / 2d²: 4 with 64 KiB of half precision and d = 64."""
        small, large = (flash_traffic(32768, 32768, 64, 2, tile_sizes(64, kib << 10, 2)[1], 64) for kib in (64, 128))
        assert small.total / large.total == pytest.approx(2, rel=0.03)
        assert standard_traffic(32768, 32768, 64, 2).total / small.total == pytest.approx(4, rel=0.03)


class TestHeldMatrices:
    @pytest.mark.parametrize("element_bytes", [2, 4])
    @pytest.mark.parametrize("on_gpu", [False, True])
    def test_two_forward_and_more_for_gradients(self, on_gpu, element_bytes):
        forward, both = (held_matrices("standard", element_bytes, grad, on_gpu=on_gpu) for grad in (False, True))
        assert forward == 2
        assert both == (4 if on_gpu else 3)

    @pytest.mark.parametrize("grad", [False, True])
    def test_pytorchs_math_is_standard_attention_in_float32(self, grad):
        """So in half precision every matrix counts twice; on a processor, where memory is measured in tests, nearly."""
        standard = held_matrices("standard", 4, grad, on_gpu=True)
        assert held_matrices("torch-math", 4, grad, on_gpu=True) == standard
        assert held_matrices("torch-math", 2, grad, on_gpu=True) == 2 * standard
        assert standard < held_matrices("torch-math", 2, grad)

    @pytest.mark.parametrize("on_gpu", [False, True])
    def test_the_others_hold_none(self, on_gpu):
        assert held_matrices("torch-flash", 2, True, on_gpu=on_gpu) == 0


class TestFlops:
    def test_forward_is_the_papers(self):
        assert attention_flops(2, 8, 512, 512, 64, False) == 4 * 2 * 8 * 512**2 * 64

    @pytest.mark.parametrize("causal", [False, True])
    def test_backward_is_two_and_a_half_times_that(self, causal):
        forward, backward, both = (
            attention_flops(1, 2, 7, 9, 3, causal, direction) for direction in ("forward", "backward", "both")
        )
        assert backward == 2.5 * forward
        assert both == forward + backward

    @given(size, size)
    def test_causal_counts_exactly_the_visible_pairs(self, queries, keys):
        visible = sum(k <= q + keys - queries for q in range(queries) for k in range(keys))
        assert visible_pairs(queries, keys, True) == visible
        assert attention_flops(1, 1, queries, keys, 1, True) == 4 * visible
        assert visible_pairs(queries, keys, False) == queries * keys

    def test_pytorch_counts_the_same(self):
        q, k, v = torch.zeros(3, 1, 2, 16, 8)
        with FlopCounterMode(display=False) as counter:
            (q @ k.mT).softmax(-1) @ v
        assert counter.get_total_flops() == attention_flops(1, 2, 16, 16, 8, False)


class TestErrors:
    @pytest.mark.parametrize("place", range(6))
    def test_sizes_start_at_one(self, place):
        sizes = [4] * 6
        sizes[place] = 0
        for call in (flash_traffic, flash_backward_traffic):
            with pytest.raises(ValueError, match=r"\(0\) must be at least 1"):
                call(*sizes)

    @pytest.mark.parametrize(
        ("call", "sizes"),
        [
            (standard_traffic, (1, 1, 0, 4)),
            (standard_backward_traffic, (0, 1, 1, 4)),
            (tile_sizes, (64, 0, 4)),
            (theorem, (1, 1, 0)),
            (attention_flops, (0, 1, 1, 1, 1, False)),
        ],
    )
    def test_the_others_too(self, call, sizes):
        with pytest.raises(ValueError, match=r"\(0\) must be at least 1"):
            call(*sizes)

    def test_a_direction_exists(self):
        with pytest.raises(ValueError, match=r"'sideways'.*forward, backward, both"):
            attention_flops(1, 1, 1, 1, 1, False, "sideways")


def test_needs_no_torch():
    script = "import sys, engine.flash.traffic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
