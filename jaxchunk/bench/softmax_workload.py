"""The paper's microbenchmark (section 3.2): a matrix product, a softmax in place, and a second product, in chunks.

One chunk of C rows, in the letters of the code:

    z   = a B              [C, N]  logits, in the dtype of the operands: compute-bound
    p   = softmax(z)       [C, N]  in place of z: memory-bound
    acc = acc + a^T p      [K, N]  fp32 carry, accumulated inside the GEMM: compute-bound

The result is the accumulator, so nothing of it can be optimised away; `hlo` checks that against the compiled program.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxchunk.bench.softmax_kernel import softmax_rows
from jaxchunk.errors import InputError
from jaxchunk.interleaving import interleave
from jaxchunk.lm_head.chunks import matmul, split_rows

DTYPES = ("bfloat16", "float16", "float32")
SOFTMAXES = ("pallas", "pallas_interpret", "xla")
INPUTS = ("random", "zero")
_SLAB_ELEMENTS = 2**22  # random numbers made at a time: 16 MiB of float32


@dataclasses.dataclass(frozen=True)
class SoftmaxWorkload:
    """A [M, K] times B [K, N], softmax over the rows, and A^T times that.

    Attributes:
      m: M, rows of A; they are what is chunked.
      k: K, columns of A.
      n: N, columns of B.
      dtype: of the operands and the logits; one of `DTYPES`.
      softmax: "pallas" (one kernel, in place; needs a GPU), "pallas_interpret" (the same in JAX's interpreter) or "xla"
        (whatever XLA makes of jnp; on a GPU it holds a second set of logits).
    """

    m: int
    k: int
    n: int
    dtype: str = "bfloat16"
    softmax: str = "pallas"

    def __post_init__(self) -> None:
        for name in ("m", "k", "n"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, choices in (("dtype", DTYPES), ("softmax", SOFTMAXES)):
            _check_choice(name, getattr(self, name), choices)

    def operands(
        self, inputs: str, seed: int = 0, *, logit_std: float = 1.0
    ) -> tuple[Float[Array, "M K"], Float[Array, "K N"]]:
        """A and B on the default device, made slab by slab: no float32 copy of either ever exists.

        Args:
          inputs: "random": A ~ N(0, 1) and B ~ N(0, logit_std^2 / K), so that logits have the standard deviation
            `logit_std`; "zero": zeros, which draw less power at the same arithmetic.
          seed: of the random operands.
          logit_std: standard deviation of the logits of random operands.

        Raises:
          InputError: an argument is out of its domain.
        """
        _check_choice("inputs", inputs, INPUTS)
        if not 0 < logit_std < math.inf:
            raise InputError(f"logit_std is {logit_std}; it must be a finite number greater than 0")
        shapes = (self.m, self.k), (self.k, self.n)
        if inputs == "zero":
            a, b = (jnp.zeros(shape, self.dtype) for shape in shapes)
            return a, b
        keys, stds = jax.random.split(jax.random.key(seed)), (1.0, logit_std / math.sqrt(self.k))
        a, b = (_normal(*how, self.dtype) for how in zip(keys, shapes, stds, strict=True))
        return a, b

    def chunk_rows(self, num_chunks: int) -> int:
        """C, rows of a chunk; all chunks are equal.

        Raises:
          InputError: some of the chunks would be empty.
        """
        if not 1 <= num_chunks <= self.m:
            raise InputError(f"num_chunks is {num_chunks}; for {self.m} rows it must be from 1 to {self.m}")
        rows, needed = split_rows(self.m, num_chunks)
        if needed < num_chunks:
            raise InputError(
                f"num_chunks is {num_chunks}, which leaves some empty: {needed} chunks of {rows} rows hold all {self.m}"
            )
        return rows

    def accumulate(self, a: Float[Array, "M K"], b: Float[Array, "K N"], num_chunks: int) -> Float[Array, "K N"]:
        """The accumulator A^T softmax(A B), float32, with one chunk of logits in memory at a time.

        To be jitted with a static `num_chunks`. The chunks are a `lax.scan`, because XLA may reorder a Python loop's;
        with one chunk there is no loop. Where `num_chunks` does not divide M, A is copied with rows of zeros below it:
        their softmax is uniform, but a row of zeros in A adds nothing to the accumulator.

        Args:
          a: A, in the workload's dtype.
          b: B, in the workload's dtype.
          num_chunks: number of chunks that the rows of A are split into.

        Raises:
          InputError: the operands are not the workload's, or some of the chunks would be empty.
        """
        for name, array, shape in (("a", a, (self.m, self.k)), ("b", b, (self.k, self.n))):
            if array.shape != shape or array.dtype != self.dtype:
                raise InputError(f"{name} is {array.dtype}{list(array.shape)}; it must be {self.dtype}{list(shape)}")
        rows = self.chunk_rows(num_chunks)

        if num_chunks > 1 and (padding := num_chunks * rows - self.m):
            a = jnp.pad(a, ((0, padding), (0, 0)))

        def product(chunk: Array, b: Array) -> tuple[Array, Array]:
            return chunk, matmul(chunk, b, (1, 0), self.dtype)

        def softmax(state: tuple[Array, Array], _: Array) -> tuple[Array, Array]:
            chunk, logits = state
            return chunk, self._softmax(logits)

        def accumulated(state: tuple[Array, Array], _: Array) -> tuple[tuple[()], Array]:
            return (), matmul(*state, (0, 0), jnp.float32)

        return interleave([product, softmax, accumulated], a, b, num_chunks=num_chunks, sums=True)[1]

    def reference(self, a: Float[Array, "M K"], b: Float[Array, "K N"]) -> Float[Array, "K N"]:
        """The same unchunked, float32 throughout."""
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return matmul(a, jax.nn.softmax(matmul(a, b, (1, 0), jnp.float32), axis=1), (0, 0), jnp.float32)

    def memory_bytes(self, num_chunks: int) -> int:
        """What a call needs on a GPU: operands, accumulator and a chunk of logits (two with XLA's softmax).

        An estimate from the shapes, for messages before anything is compiled; a program's `memory_analysis` knows more.
        """
        itemsize, rows = jnp.dtype(self.dtype).itemsize, self.chunk_rows(num_chunks)
        elements = self.m * self.k + self.k * self.n
        elements += (1 if self.softmax == "pallas" else 2) * rows * self.n
        if num_chunks > 1:
            elements += rows * self.k  # the chunk, cut out of A
        if padded := num_chunks * rows - self.m:
            elements += (self.m + padded) * self.k
        return elements * itemsize + 4 * self.k * self.n

    def _softmax(self, logits: Float[Array, "C N"]) -> Float[Array, "C N"]:
        if self.softmax != "xla":
            return softmax_rows(logits, interpret=self.softmax == "pallas_interpret")
        return jax.nn.softmax(logits.astype(jnp.float32), axis=1).astype(logits.dtype)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; choose from {', '.join(choices)}")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: Array, shape: tuple[int, int], std: float, dtype: str) -> Float[Array, "R S"]:
    """Normal numbers drawn in float32 (16-bit random bits have too few values) and rounded slab by slab."""
    rows, columns = shape
    slab_rows = min(rows, max(1, _SLAB_ELEMENTS // columns))

    def fill(i: Array, filled: Array) -> Array:
        slab = std * jax.random.normal(jax.random.fold_in(key, i), (slab_rows, columns), jnp.float32)
        # The last slab's start is clamped, so that it overwrites some rows of the one before.
        return lax.dynamic_update_slice_in_dim(filled, slab.astype(dtype), i * slab_rows, axis=0)

    return lax.fori_loop(0, -(-rows // slab_rows), fill, jnp.empty(shape, dtype))
