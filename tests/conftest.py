"""Eight CPU devices for every test, strict ranks, and the folder of outside material."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads of XLA's pool: fake devices wait for each other
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 "  # tests compile more than they compute: half the time
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# many steps in flight over fake devices can starve one another's collectives of threads
jax.config.update("jax_cpu_enable_async_dispatch", False)

MATERIAL = Path(__file__).parent / "material"


@pytest.fixture(scope="session")
def material() -> Path:
    """Redistributable oracles that lie in the repository."""
    return MATERIAL


@pytest.fixture(scope="session")
def outside_material() -> Path:
    """Oracles that may not be shipped: Meta's tokenizer, larger corpora."""
    folder = os.environ.get("CODELLAMA_MATERIAL")
    if not folder:
        pytest.skip("set CODELLAMA_MATERIAL to a folder with Meta's tokenizer to run this")
    return Path(folder)
