"""Attention over a cache that is read in parts: the merge is exact, whatever the parts."""

import math

import pytest
import torch

from engine.attention import attend
from engine.errors import InputError
from engine.flash.split import attend_parts, merge, split_attention

SHAPES = [(1, 1, 1, 1, 5, 8), (2, 4, 2, 1, 64, 16), (1, 8, 1, 1, 100, 8), (2, 6, 3, 3, 17, 4)]
"""B, H, G, Tq, Tk, d."""


def draw(shape, seed, dtype=torch.float64, size=1.0):
    B, H, G, Tq, Tk, d = shape
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads, length):
        return (size * torch.randn(B, heads, length, d, generator=generator, dtype=torch.float64)).to(dtype)

    return tensor(H, Tq), tensor(G, Tk), tensor(G, Tk)


def relative(found, reference):
    return ((found.double() - reference).square().mean() / reference.square().mean()).sqrt().item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_the_parts_merge_to_the_whole(shape, splits, seed):
    Q, K, V = draw(shape, seed)
    torch.testing.assert_close(split_attention(Q, K, V, splits), attend(Q, K, V)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_parts_cover_the_cache_once_and_their_sums_are_the_softmax_denominator(splits):
    Q, K, V = draw((1, 4, 2, 1, 29, 8), 0)
    parts = attend_parts(Q, K, V, splits)
    assert parts.starts[0] == 0
    assert list(parts.starts) == sorted(set(parts.starts))
    assert parts.maximum.shape == parts.sum.shape == (1, 4, len(parts.starts), 1)
    scores = Q @ K.repeat_interleave(2, 1).mT / math.sqrt(8)  # (1, 4, 1, 29)
    for index, piece in enumerate(scores.tensor_split(parts.starts[1:], -1)):
        torch.testing.assert_close(parts.maximum[:, :, index], piece.amax(-1))
        torch.testing.assert_close(
            parts.sum[:, :, index], (piece - piece.amax(-1, keepdim=True)).exp().sum(-1), atol=1e-12, rtol=1e-12
        )
    torch.testing.assert_close(merge(parts).logsumexp, scores.logsumexp(-1), atol=1e-12, rtol=1e-12)


def test_the_order_of_the_parts_does_not_matter():
    Q, K, V = draw((1, 2, 2, 1, 24, 8), 3)
    halves = torch.cat([K[:, :, 12:], K[:, :, :12]], 2), torch.cat([V[:, :, 12:], V[:, :, :12]], 2)
    torch.testing.assert_close(split_attention(Q, K, V, 2), split_attention(Q, *halves, 2), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_neither_overflow_nor_lose_more_than_the_format_does(dtype):
    Q, K, V = draw((1, 4, 4, 1, 256, 64), 0, dtype, size=8.0)  # scores of some 500: exp is infinite even in float32
    found = split_attention(Q, K, V, 8)
    assert found.dtype == dtype
    reference = attend(Q.double(), K.double(), V.double())[0]
    assert relative(found, reference) <= 2 * relative(attend(Q, K, V)[0], reference)


@pytest.mark.parametrize(("splits", "length"), [(0, 8), (9, 8)])
def test_splits_that_leave_a_part_empty_are_refused(splits, length):
    Q, K, V = draw((1, 1, 1, 1, length, 4), 0)
    with pytest.raises(InputError, match=rf"splits \({splits}\)"):
        split_attention(Q, K, V, splits)


def test_heads_that_do_not_group_are_refused():
    Q, K, V = draw((1, 3, 2, 1, 8, 4), 0)
    with pytest.raises(InputError, match=r"3.*2"):
        split_attention(Q, K, V, 2)
