"""Threads of the CPU: enough of them where jaxlib's LAPACK calls can wait for each other for ever.

jaxlib 0.10 and 0.11 split a large batch of LAPACK calls (``vmap`` of a Cholesky factor, a solve) into tasks of XLA's
thread pool, and the caller, itself a thread of the pool, waits for them (``ParallelBatchMap`` in jaxlib's
``lapack_kernels.cc``). As many such calls at once as there are threads wait for ever: two, on a machine of two cores. A
pool of `NUM_THREADS` threads has some left. jaxlib 0.12 does not split. XLA reads the number from ``NPROC`` when it
starts.
"""

import os

import jaxlib

NUM_THREADS = 16
"""Threads of the pool: more than a program has LAPACK calls that could run at once. Chosen by judgement."""
SPLITS = ((0, 10), (0, 11))
"""Versions of jaxlib that split batches of LAPACK calls."""


def provide_threads() -> None:
    """Ask XLA for a pool of at least `NUM_THREADS` threads, unless ``NPROC`` is set. Harmless once XLA has started."""
    if jaxlib.version.__version_info__[:2] in SPLITS and (os.cpu_count() or 1) < NUM_THREADS:
        os.environ.setdefault("NPROC", str(NUM_THREADS))
