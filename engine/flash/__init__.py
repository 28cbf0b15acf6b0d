"""FlashAttention: exact attention that never holds the matrix of weights (Dao et al. 2022 and 2023).

`online` is the idea in one dimension, `grid` the tiles and what a causal mask leaves of them, `tiled` the algorithm
tile by tile in plain PyTorch, `traffic` what it moves between the device's memory and the chip, `split` one query
against a long cache. `triton_forward` is the same algorithm as a kernel, `backends` everything that can compute
attention here, `choice` the fastest of them, `attention` the layers.
"""
