"""XLA's thread pool: large enough that LAPACK calls of one program cannot all wait for each other."""

import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

from scoreinfer._threads import NUM_THREADS, SPLITS

COUNT = """
import jax, scoreinfer
jax.numpy.zeros(3).block_until_ready()
from pathlib import Path
print(sum((task / "comm").read_text().strip() == "tf_XLAEigen" for task in Path("/proc/self/task").iterdir()))
"""


@pytest.mark.always
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.skipif(jaxlib.version.__version_info__[:2] not in SPLITS, reason="this jaxlib does not split batches")
def test_a_program_has_more_threads_than_lapack_calls(monkeypatch):
    """Two batched Cholesky factors at once hang a pool of two threads."""
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert int(found.stdout) >= NUM_THREADS
