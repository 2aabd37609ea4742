"""The chunk count that chooses itself: before training (`choose_num_chunks`), or while it goes on (`policy`).

`choice` measures the loss alone, by the benchmarks' protocol (`contest`), until candidates are told apart (`race`, on
the intervals of `intervals`). `policy` decides from what training steps cost, as a pure function; `controller` applies
it in the trainer, `simulation` to a simulated GPU. docs/chunk_choice.md has the reasons and the guarantees.
"""

from jaxchunk.tuning.candidates import candidate_counts
from jaxchunk.tuning.choice import Candidate, ChunkChoice, choose_num_chunks
from jaxchunk.tuning.objective import Objective

__all__ = ["Candidate", "ChunkChoice", "Objective", "candidate_counts", "choose_num_chunks"]
