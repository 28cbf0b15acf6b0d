"""FlashAttention tile by tile: standard attention's numbers and gradients, and a stream whose steps add up."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.flash.tiled import (
    differentiable_tiled_attention,
    stream_backward_tiles,
    stream_tiles,
    tiled_attention,
    tiled_backward,
)
from engine.flash.traffic import flash_backward_traffic, flash_traffic

SEEDS = range(5)
TOLERANCE = {"rtol": 0, "atol": 1e-10}

LENGTHS = ((1, 1), (1, 9), (9, 1), (8, 8), (7, 13), (13, 7), (16, 5), (17, 17))
"""(Tq, Tk): one token, one query or key, whole blocks, ragged ones, causal rows and whole blocks that see nothing."""

BLOCKS = ((1, 1), (4, 4), (3, 5), (5, 2), (64, 64))
"""(Br, Bc): single scores, squares, sizes that do not divide, larger than everything."""

small = st.integers(1, 14)
block = st.integers(1, 16)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(queries, keys, *, seed=0, width=6, num=4, groups=2, batch=2, dtype=torch.float64):
    """Q (B, H, Tq, d), K and V (B, G, Tk, d)."""
    shapes = ((batch, num, queries, width), (batch, groups, keys, width), (batch, groups, keys, width))
    return [normal(*shape, seed=3 * seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def one_head(queries, keys, *, seed=0, width=6, dtype=torch.float64):
    return [x[0, 0] for x in heads(queries, keys, seed=seed, width=width, num=1, groups=1, batch=1, dtype=dtype)]


def standard(q, k, v, causal=False, scale=None):
    """Attention and logsumexp with all scores at once; a row that sees nothing is 0, and so is its gradient."""
    if q.dim() > 2:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
    allowed = allowed.tril(scores.shape[-1] - scores.shape[-2]) if causal else allowed
    weights = scores.masked_fill(~allowed, -1e300).softmax(-1).masked_fill(~allowed, 0.0)
    return weights @ v, scores.masked_fill(~allowed, -math.inf).logsumexp(-1)


def gradients(attention, q, k, v, upstream):
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*inputs), inputs, upstream)


class TestAttention:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_equals_standard_attention(self, lengths, causal, seed):
        q, k, v = heads(*lengths, seed=seed)
        expected, expected_logsumexp = standard(q, k, v, causal)
        for block_q, block_k in BLOCKS:
            output, logsumexp = tiled_attention(q, k, v, block_q=block_q, block_k=block_k, causal=causal)
            torch.testing.assert_close(output, expected, **TOLERANCE)
            torch.testing.assert_close(logsumexp, expected_logsumexp, **TOLERANCE)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_gradients_equal_standard_attentions(self, lengths, causal, seed):
        q, k, v = heads(*lengths, seed=seed)
        upstream = normal(*q.shape, seed=99 + seed)
        expected = gradients(lambda *x: standard(*x, causal)[0], q, k, v, upstream)
        for block_q, block_k in BLOCKS:
            found = gradients(
                lambda *x, br=block_q, bc=block_k: differentiable_tiled_attention(
                    *x, block_q=br, block_k=bc, causal=causal
                ),
                *(q, k, v, upstream),
            )
            torch.testing.assert_close(found, expected, **TOLERANCE)

    @given(small, small, block, block, st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_any_size_any_block_any_grouping(self, queries, keys, block_q, block_k, causal, groups, shared, seed):
        q, k, v = heads(queries, keys, seed=seed, num=groups * shared, groups=groups, batch=1)
        upstream = normal(*q.shape, seed=seed)
        tiles = {"block_q": block_q, "block_k": block_k, "causal": causal}
        torch.testing.assert_close(tiled_attention(q, k, v, **tiles), standard(q, k, v, causal), **TOLERANCE)
        torch.testing.assert_close(
            gradients(lambda *x: differentiable_tiled_attention(*x, **tiles), q, k, v, upstream),
            gradients(lambda *x: standard(*x, causal)[0], q, k, v, upstream),
            **TOLERANCE,
        )

    @pytest.mark.parametrize("seed", SEEDS)
    def test_agrees_with_pytorch(self, seed):
        q, k, v = heads(11, 11, seed=seed)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(tiled_attention(q, k, v, block_q=4, block_k=3, causal=True)[0], expected)

    def test_a_query_head_reads_its_own_group(self):
        """Heads 0 and 1 share key head 0, heads 2 and 3 key head 1; the other assignment is something else."""
        q, k, v = heads(5, 5)
        output, _ = tiled_attention(q, k, v, block_q=2, block_k=2)
        for head in range(4):
            expected, _ = standard(q[:, head], k[:, head // 2], v[:, head // 2])
            torch.testing.assert_close(output[:, head], expected, **TOLERANCE)

    @pytest.mark.parametrize("dims", [2, 3, 5])
    def test_any_number_of_leading_axes(self, dims):
        q, k, v = heads(7, 9)
        q, k, v = (x[0, 0] if dims == 2 else x[0] if dims == 3 else x[None] for x in (q, k, v))
        output, logsumexp = tiled_attention(q, k, v, block_q=3, block_k=4, causal=True)
        torch.testing.assert_close((output, logsumexp), standard(q, k, v, True), **TOLERANCE)
        assert tiled_backward(normal(*q.shape), q, k, v, output, logsumexp)[1].shape == k.shape

    @pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
    def test_the_scale_reaches_output_and_gradients(self, scale):
        q, k, v = heads(6, 7)
        upstream = normal(*q.shape, seed=5)
        torch.testing.assert_close(tiled_attention(q, k, v, scale=scale), standard(q, k, v, scale=scale), **TOLERANCE)
        torch.testing.assert_close(
            gradients(lambda *x: differentiable_tiled_attention(*x, block_k=2, scale=scale), q, k, v, upstream),
            gradients(lambda *x: standard(*x, scale=scale)[0], q, k, v, upstream),
            **TOLERANCE,
        )

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", [(4, 4), (3, 5), (5, 3)])
    def test_gradcheck(self, lengths, causal):
        q, k, v = (x.requires_grad_() for x in heads(*lengths, width=3, batch=1))
        tiles = {"block_q": 2, "block_k": 2, "causal": causal}
        assert torch.autograd.gradcheck(lambda *x: differentiable_tiled_attention(*x, **tiles), (q, k, v))

    @pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
    def test_rows_that_see_nothing_are_zero_and_leave_no_gradient(self, block_q, block_k):
        """Nine queries, four keys: the first five see nothing."""
        q, k, v = heads(9, 4)
        tiles = {"block_q": block_q, "block_k": block_k, "causal": True}
        output, logsumexp = tiled_attention(q, k, v, **tiles)
        assert (output[..., :5, :] == 0).all()
        assert (logsumexp[..., :5] == -math.inf).all()
        assert logsumexp[..., 5:].isfinite().all()
        upstream = normal(*q.shape, seed=1)
        dq, dk, dv = tiled_backward(upstream, q, k, v, output, logsumexp, **tiles)
        assert (dq[..., :5, :] == 0).all()
        upstream[..., :5, :] = 1e6
        torch.testing.assert_close(
            tiled_backward(upstream, q, k, v, output, logsumexp, **tiles), (dq, dk, dv), **TOLERANCE
        )

    def test_no_keys_at_all(self):
        q, k, v = heads(3, 0)
        output, logsumexp = tiled_attention(q, k, v)
        assert (output == 0).all()
        assert (logsumexp == -math.inf).all()

    def test_scores_far_beyond_the_exponential(self):
        """exp(1e4) overflows even float64."""
        q, k, v = heads(8, 8)
        output, logsumexp = tiled_attention(1e2 * q, 1e2 * k, v, block_q=3, block_k=3)
        expected, expected_logsumexp = standard(1e2 * q, 1e2 * k, v)
        assert expected_logsumexp.max() > 1e3
        torch.testing.assert_close(output, expected, **TOLERANCE)
        torch.testing.assert_close(logsumexp, expected_logsumexp)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_half_precision_is_only_rounded_once(self, dtype, seed):
        """Sums are float32, so nothing is lost but in the output's own rounding (and float32's, far below)."""
        q, k, v = heads(33, 33, seed=seed, dtype=dtype)
        output, logsumexp = tiled_attention(q, k, v, block_q=8, block_k=8, causal=True)
        expected, expected_logsumexp = standard(q.double(), k.double(), v.double(), True)
        assert (output.dtype, logsumexp.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(output.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(logsumexp.double(), expected_logsumexp, rtol=0, atol=1e-5)
        grads = gradients(lambda *x: differentiable_tiled_attention(*x, block_q=8, block_k=8), q, k, v, q)
        assert [x.dtype for x in grads] == [dtype] * 3
        exact = [x.double() for x in (q, k, v, q)]
        expected = gradients(lambda *x: standard(*x)[0], *exact)
        for found, wanted in zip(grads, expected, strict=True):
            assert (found.double() - wanted).norm() < 2 * torch.finfo(dtype).eps * wanted.norm()

    def test_nan_goes_where_standard_attention_carries_it(self):
        q, k, v = heads(6, 6)
        q[0, 1, 2, 0] = math.nan
        k[1, 0, 4, 3] = math.nan
        output, _ = tiled_attention(q, k, v, block_q=4, block_k=4, causal=True)
        expected, _ = standard(q, k, v, True)
        assert torch.equal(output.isnan(), expected.isnan())
        torch.testing.assert_close(output, expected, equal_nan=True, **TOLERANCE)

    def test_backward_keeps_no_matrix(self):
        """Autograd's saved tensors grow with T · d: none has a row per query and a column per key."""
        saved = []
        q, k, v = (x.requires_grad_() for x in heads(40, 40))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            differentiable_tiled_attention(q, k, v)
        assert len(saved) == 5
        assert all(shape[-2:] != (40, 40) for shape in saved)


def assert_steps_chain(tiles):
    """Each state follows from the one before by the recurrence, and what it says of its tile is true."""
    before = None
    for tile in tiles:
        if tile.key_block == 0:
            assert (tile.maximum_before == -math.inf).all()
            assert (tile.sum_before == 0).all()
            assert (tile.output_before == 0).all()
        else:
            assert torch.equal(tile.maximum_before, before.maximum)
            assert torch.equal(tile.sum_before, before.sum)
            assert torch.equal(tile.output_before, before.output)
        before = tile


class TestStream:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", LENGTHS)
    @pytest.mark.parametrize("tile_sizes", BLOCKS)
    def test_every_step_follows_from_its_own_numbers(self, lengths, causal, tile_sizes):
        q, k, v = one_head(*lengths)
        tiles = list(stream_tiles(q, k, v, block_q=tile_sizes[0], block_k=tile_sizes[1], causal=causal))
        assert_steps_chain(tiles)
        for tile in tiles:
            if tile.skipped:
                assert tile.scores is tile.probabilities is None
                assert (tile.rescale == 1).all()
                added = torch.zeros(()), torch.zeros(())
            else:
                row_maximum = tile.scores.amax(-1)
                assert torch.equal(tile.maximum, torch.maximum(tile.maximum_before, row_maximum))
                seen = tile.maximum > -math.inf
                factor = torch.where(seen, (tile.maximum_before - tile.maximum).exp(), 0.0)
                torch.testing.assert_close(tile.rescale, factor, **TOLERANCE)
                weights = torch.where(seen[:, None], (tile.scores - tile.maximum[:, None]).exp(), 0.0)
                torch.testing.assert_close(tile.probabilities, weights, **TOLERANCE)
                added = tile.probabilities.sum(-1), tile.probabilities @ v[tile.columns]
            torch.testing.assert_close(tile.sum, tile.rescale * tile.sum_before + added[0], **TOLERANCE)
            output = tile.rescale[:, None] * tile.output_before + added[1]
            torch.testing.assert_close(tile.output, output, **TOLERANCE)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_each_state_is_attention_to_the_keys_so_far(self, lengths, causal):
        q, k, v = one_head(*lengths)
        for tile in stream_tiles(q, k, v, block_q=3, block_k=4, causal=causal):
            if tile.skipped:
                continue
            whole = (q @ k.mT) * q.shape[-1] ** -0.5
            hidden = torch.ones_like(whole).tril(lengths[1] - lengths[0]) == 0 if causal else whole.isnan()
            whole = whole.masked_fill(hidden, -math.inf)
            torch.testing.assert_close(tile.scores, whole[tile.rows, tile.columns], **TOLERANCE)
            so_far = whole[tile.rows, : tile.columns.stop]
            expected = so_far.softmax(-1).nan_to_num(0.0) @ v[: tile.columns.stop]
            torch.testing.assert_close(tile.normalized, expected, **TOLERANCE)
            torch.testing.assert_close(tile.logsumexp, so_far.logsumexp(-1), **TOLERANCE)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("lengths", LENGTHS)
    @pytest.mark.parametrize("tile_sizes", BLOCKS)
    def test_the_order_and_what_the_mask_does_to_each_tile(self, lengths, causal, tile_sizes):
        queries, keys = lengths
        q, k, v = one_head(*lengths)
        tiles = list(stream_tiles(q, k, v, block_q=tile_sizes[0], block_k=tile_sizes[1], causal=causal))
        rows, columns = math.ceil(queries / tile_sizes[0]), math.ceil(keys / tile_sizes[1])
        expected = list(itertools.product(range(rows), range(columns)))
        assert [(tile.query_block, tile.key_block) for tile in tiles] == expected
        visible = torch.ones(queries, keys).tril(keys - queries) > 0 if causal else torch.ones(queries, keys) > 0
        for tile in tiles:
            inside = visible[tile.rows, tile.columns]
            assert tile.skipped == (not inside.any())
            assert tile.partial == (bool(inside.any()) and not inside.all())
        for block_rows in range(rows):
            visited = [tile for tile in tiles if tile.query_block == block_rows and not tile.skipped]
            assert [tile.last for tile in visited] == [False] * (len(visited) - 1) + [True] * bool(visited)
        assert not any(tile.last for tile in tiles if tile.skipped)

    def test_autograd_records_no_step(self):
        """What it recorded would be the matrix that is never held."""
        q, k, v = (x.requires_grad_() for x in one_head(5, 5))
        steps = list(stream_tiles(q, k, v, block_q=2, block_k=2))
        output, logsumexp = tiled_attention(q, k, v)
        backward = list(stream_backward_tiles(q, q, k, v, output, logsumexp, block_q=2, block_k=2))
        assert not any(step.output.requires_grad or step.scores.requires_grad for step in steps)
        assert not any(step.D.requires_grad or step.dK.requires_grad for step in backward)
        assert not any(x.requires_grad for x in (output, logsumexp, *tiled_backward(q, q, k, v, output, logsumexp)))

    def test_states_are_not_changed_afterwards(self):
        q, k, v = one_head(9, 9)
        kept, copies = [], []
        for tile in stream_tiles(q, k, v, block_q=3, block_k=2):
            kept.append(tile)
            copies.append((tile.maximum.clone(), tile.sum.clone(), tile.output.clone()))
        for tile, (maximum, total, output) in zip(kept, copies, strict=True):
            assert torch.equal(tile.maximum, maximum)
            assert torch.equal(tile.sum, total)
            assert torch.equal(tile.output, output)

    @given(small, small, block, block, st.booleans(), st.sampled_from([torch.float64, torch.float32, torch.float16]))
    @settings(max_examples=80, deadline=None)
    def test_the_bytes_add_up_to_the_model(self, queries, keys, block_q, block_k, causal, dtype):
        q, k, v = one_head(queries, keys, dtype=dtype)
        tiles = {"block_q": block_q, "block_k": block_k, "causal": causal}
        sizes = (queries, keys, q.shape[-1], dtype.itemsize, block_q, block_k, causal)
        forward = list(stream_tiles(q, k, v, **tiles))
        output, logsumexp = tiled_attention(q, k, v, **tiles)
        backward = list(stream_backward_tiles(normal(*q.shape, dtype=dtype), q, k, v, output, logsumexp, **tiles))
        for steps, expected in ((forward, flash_traffic(*sizes)), (backward, flash_backward_traffic(*sizes))):
            assert sum(step.bytes_read for step in steps) == expected.read
            assert sum(step.bytes_written for step in steps) == expected.written
            assert all(step.bytes_read == step.bytes_written == 0 for step in steps if step.skipped)
            assert all(step.bytes_read > 0 for step in steps if not step.skipped)

    def test_bytes_counted_by_hand(self):
        """Four tokens, width two, tiles of two, causal, float64: a block of Q, K, V or O has 32 bytes, its rows 16."""
        q, k, v = one_head(4, 4, width=2)
        tiles = {"block_q": 2, "block_k": 2, "causal": True}
        steps = list(stream_tiles(q, k, v, **tiles))
        assert [step.bytes_read for step in steps] == [96, 0, 96, 64]  # QKV, skipped, QKV, KV
        assert [step.bytes_written for step in steps] == [48, 0, 0, 48]  # O and logsumexp
        output, logsumexp = tiled_attention(q, k, v, **tiles)
        steps = list(stream_backward_tiles(q, q, k, v, output, logsumexp, **tiles))
        assert [(step.key_block, step.query_block) for step in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        first = 32 * 3 + 16  # Q, dO, O and logsumexp
        again = 32 * 3 + 16 * 2  # Q, dO, dQ, logsumexp and D
        assert [step.bytes_read for step in steps] == [64 + first, first, 0, 64 + again]
        assert [step.bytes_written for step in steps] == [32 + 16, 64 + 32 + 16, 0, 64 + 32]

    @pytest.mark.parametrize("seed", SEEDS)
    def test_backward_steps_are_the_gradients_taken_apart(self, seed):
        q, k, v = (x.requires_grad_() for x in one_head(7, 9, seed=seed))
        upstream = normal(7, 6, seed=50 + seed)
        scores = ((q @ k.mT) * 6**-0.5).masked_fill(torch.ones(7, 9).tril(2) == 0, -math.inf)
        weights = scores.softmax(-1)
        scores.retain_grad()
        (weights @ v).backward(upstream)
        output, logsumexp = tiled_attention(q, k, v, causal=True)
        total = [torch.zeros_like(x) for x in (q, k, v)]
        for tile in stream_backward_tiles(upstream, q, k, v, output, logsumexp, block_q=3, block_k=2, causal=True):
            if tile.skipped:
                assert tile.probabilities is tile.D is tile.dS is tile.dQ is tile.dK is tile.dV is None
                continue
            torch.testing.assert_close(tile.probabilities, weights[tile.rows, tile.columns].detach(), **TOLERANCE)
            torch.testing.assert_close(tile.dS, scores.grad[tile.rows, tile.columns], **TOLERANCE)
            torch.testing.assert_close(tile.D, (upstream * output)[tile.rows].sum(-1), **TOLERANCE)
            total[0][tile.rows] += tile.dQ
            total[1][tile.columns] += tile.dK
            total[2][tile.columns] += tile.dV
        torch.testing.assert_close(total, [x.grad for x in (q, k, v)], **TOLERANCE)


class TestErrors:
    @pytest.mark.parametrize("name", ["block_q", "block_k"])
    @pytest.mark.parametrize("size", [0, -3])
    def test_a_tile_has_rows_and_columns(self, name, size):
        sizes = {"block_q": 2, "block_k": 2, name: size}
        q, k, v = one_head(4, 4)
        for call in (stream_tiles, tiled_attention, differentiable_tiled_attention):
            with pytest.raises(ValueError, match=rf"{name} \({size}\)"):
                call(q, k, v, **sizes)
        for call in (stream_backward_tiles, tiled_backward):
            with pytest.raises(InputError, match=rf"{name} \({size}\)"):
                call(q, q, k, v, q, q[:, 0], **sizes)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((4,), (4,), (4,)), "Q must be"),
            (((4, 2), (4, 3), (4, 3)), "same d"),
            (((4, 2), (4, 2), (5, 2)), "same d"),
            (((4, 0), (4, 0), (4, 0)), "same d"),
            (((1, 4, 2), (4, 2), (4, 2)), "same d"),
            (((3, 4, 2), (2, 4, 2), (2, 4, 2)), r"query heads \(3\) must be a multiple of the key heads \(2\)"),
            (((3, 4, 2), (0, 4, 2), (0, 4, 2)), "multiple"),
            (((2, 1, 4, 2), (3, 1, 4, 2), (3, 1, 4, 2)), "same batch"),
        ],
    )
    def test_shapes_that_do_not_fit(self, shapes, message):
        with pytest.raises(ValueError, match=message):
            tiled_attention(*(torch.zeros(shape) for shape in shapes))

    def test_dtypes_that_do_not_fit(self):
        q, k, v = one_head(4, 4)
        with pytest.raises(ValueError, match="one floating-point dtype"):
            tiled_attention(q.float(), k, v)
        with pytest.raises(ValueError, match="one floating-point dtype"):
            tiled_attention(q.long(), k.long(), v.long())

    def test_a_scale_is_a_number(self):
        with pytest.raises(ValueError, match="scale"):
            tiled_attention(*one_head(4, 4), scale=math.inf)

    def test_streams_take_one_head(self):
        q, k, v = heads(4, 4)
        with pytest.raises(ValueError, match="one head"):
            stream_tiles(q, k, v, block_q=2, block_k=2)
        with pytest.raises(ValueError, match="one head"):
            stream_backward_tiles(q, q, k, v, q, q[..., 0], block_q=2, block_k=2)

    def test_backward_needs_what_forward_returned(self):
        q, k, v = one_head(4, 6)
        with pytest.raises(ValueError, match="dO and O must have Q's shape"):
            tiled_backward(k, q, k, v, q, q[:, 0])
        with pytest.raises(ValueError, match="logsumexp"):
            tiled_backward(q, q, k, v, q, k[:, 0])
