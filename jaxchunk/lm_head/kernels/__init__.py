"""Row kernels: what reads and writes the logits of a chunk, one file per back end.

Every back end provides three functions of `raw[C, V]` (what the GEMM wrote), `labels[C]`, `bias[V]` or None and
`RowOptions`:

    statistics(raw, labels, bias, options) -> RowStatistics             one read
    gradients(raw, labels, bias, coefficients, options) -> draw[C, V]   one read, one write
    statistics_and_gradients(raw, labels, row_weight, bias, options) -> (RowStatistics, draw[C, V])

Statistics are in at least float32; `draw` has the dtype of `raw`. The Pallas kernels write it over the logits; XLA
leaves that to the compiler (on a GPU, JAX 0.11.2 holds both at once). A label of -1 matches no column: the row is
ignored (the caller gives it weight 0), or its label's column is in another slice of the vocabulary.
"""
