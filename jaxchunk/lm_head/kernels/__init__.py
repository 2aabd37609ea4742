"""Row kernels: logits of a chunk in, losses and logit gradients out, one file per back end.

Every back end provides

    losses(logits[C, V], labels[C]) -> loss[C]
    losses_and_gradients(logits[C, V], labels[C], row_weight[C]) -> (loss[C], dlogits[C, V])

with statistics and losses in at least float32, and `dlogits` in the dtype of `logits`. The Pallas kernel writes them
over the logits; the XLA one leaves that to the compiler (on a GPU, JAX 0.11.2 holds both at once). A label of -1
matches no column (the caller gives such rows weight 0).
"""
