"""Which chunk counts are worth measuring."""

from jaxchunk.lm_head import split_rows

_TILE_ROWS = 128  # of the GEMM kernels that matter; a chunk is worked off in whole tiles
_LEAST_ROWS = 256  # fewer rows than two tiles leave most of a GPU idle
_MOST_WASTE = 0.02  # of rows in the last tiles of chunks that are empty, beyond those of one chunk
_MOST_CHUNKS = 32  # each chunk reads and writes dW once more, which the finer ones never win back


def candidate_counts(num_tokens: int, *, powers_only: bool = False) -> tuple[int, ...]:
    """Powers of two and the counts half way between them (3, 6, 12, ...) whose chunks fill their tiles.

    Args:
      num_tokens: T, the rows that are split into chunks.
      powers_only: leave the counts in between out.

    Returns:
      Counts, growing, from 1 to 32; 1 is always among them.
    """
    factors = (2,) if powers_only else (2, 3)
    counts = sorted({1} | {factor << k for factor in factors for k in range(_MOST_CHUNKS.bit_length())})
    return tuple(n for n in counts if n == 1 or (n <= _MOST_CHUNKS and _fills_tiles(num_tokens, n)))


def _fills_tiles(num_tokens: int, num_chunks: int) -> bool:
    rows, chunks = split_rows(num_tokens, num_chunks)
    tiles = chunks * -(-rows // _TILE_ROWS)
    return chunks == num_chunks and rows >= _LEAST_ROWS and tiles <= (1 + _MOST_WASTE) * -(-num_tokens // _TILE_ROWS)
