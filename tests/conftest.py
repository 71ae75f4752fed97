"""Eight CPU devices for every test, strict ranks, and the folder of outside material.

Properties are tried on the same examples every time, so that a change is not refused for what
another one broke. `pytest --hypothesis-profile=default` looks for new ones.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads of XLA's pool: fake devices wait for each other
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"  # tests compile more than they compute: half the time
    # by default a process whose devices wait 40 s for one another ends: a busy machine is slower
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    " --xla_cpu_collective_timeout_seconds=1200 " + os.environ.get("XLA_FLAGS", "")
)

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "same_examples",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # of the machine, not of the test
)
hypothesis.settings.load_profile("same_examples")

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
