"""Settings shared by all tests.

Shapes and types are checked at run time by jaxtyping with beartype: `--jaxtyping-packages` in pyproject.toml.
"""

import os
from pathlib import Path

# Two CPU devices, so that kernels can be tested under `chain_method="parallel"`. Read when JAX starts: set it first.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

CACHE = Path(__file__).parents[1] / ".jax_cache"
SLOW = Path(__file__).with_name("slow.txt")


def pytest_configure(config):
    """Keep compiled programs between runs: most of a cold run is compilation.

    Parallel workers keep caches of their own: one that reads what another is still writing crashes.
    """
    root = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
    cache = root / f"tests-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that were measured as slow (`costs.py`); those marked ``always`` stay."""
    slow = set(SLOW.read_text().splitlines())
    for item in items:
        if item.nodeid in slow and item.get_closest_marker("always") is None:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """After every file: they hold memory maps, and XLA crashes where the 65,530 that Linux gives a process are gone."""
    yield
    jax.clear_caches()
