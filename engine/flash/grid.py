"""Query blocks × key blocks: which tiles there are, what the causal mask leaves of them, where loops begin and end.

Legend: Tq queries, Tk keys, Br and Bc rows and columns of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A tile's place in the grid, and which loops begin or end with it; a skipped tile neither begins nor ends one.

    Args:
        rows, columns: its queries and its keys.
        skipped: no query in it sees a key in it.
        partial: the causal mask cuts through it.
        first_of_rows, last_of_rows: the first and the last tile that its query block visits.
        first_of_columns, last_of_columns: the first and the last tile that its key block visits.
    """

    rows: slice
    columns: slice
    skipped: bool
    partial: bool
    first_of_rows: bool
    last_of_rows: bool
    first_of_columns: bool
    last_of_columns: bool


@dataclass(frozen=True)
class Grid:
    """The tiles of Tq × Tk scores; the last block of each axis may be smaller than the others.

    Args:
        queries: Tq.
        keys: Tk.
        block_q: Br.
        block_k: Bc.
        causal: query i sees the keys j ≤ i + Tk − Tq, so the last query sees the last key.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool

    @property
    def query_blocks(self) -> int:
        """⌈Tq / Br⌉."""
        return math.ceil(self.queries / self.block_q)

    @property
    def key_blocks(self) -> int:
        """⌈Tk / Bc⌉."""
        return math.ceil(self.keys / self.block_k)

    def rows(self, query_block: int) -> slice:
        """The queries of a block."""
        return slice(query_block * self.block_q, min((query_block + 1) * self.block_q, self.queries))

    def columns(self, key_block: int) -> slice:
        """The keys of a block."""
        return slice(key_block * self.block_k, min((key_block + 1) * self.block_k, self.keys))

    def seen(self, row: int) -> int:
        """How many keys the query at `row` sees; they are the first ones."""
        return min(max(row + 1 + self.keys - self.queries, 0), self.keys) if self.causal else self.keys

    def tile(self, query_block: int, key_block: int) -> Tile:
        """The tile at a place of the grid."""
        rows, columns = self.rows(query_block), self.columns(key_block)
        fewest, most = self.seen(rows.start), self.seen(rows.stop - 1)
        skipped = columns.start >= most
        unseen_above = query_block == 0 or self.seen(rows.start - 1) <= columns.start
        return Tile(
            rows,
            columns,
            skipped=skipped,
            partial=not skipped and fewest < columns.stop,
            first_of_rows=not skipped and key_block == 0,
            last_of_rows=not skipped and columns.stop >= most,
            first_of_columns=not skipped and unseen_above,
            last_of_columns=not skipped and rows.stop == self.queries,
        )
