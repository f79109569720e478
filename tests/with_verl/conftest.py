"""Real Ray workers on a CPU: one small cluster for the session, FSDP2 over gloo, no accelerator."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu,verl_scripted",
    "VERL_ENGINE_DEVICE": "cuda",  # verl registers its engines for accelerators only; on a CPU they run as well
    "OMP_NUM_THREADS": "1",
    "RAY_prestart_worker_first_driver": "0",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
}
os.environ.update(ENVIRONMENT)
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pytest  # noqa: E402
import ray  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Two places for workers, which verl takes for GPUs."""
    ray.init(
        num_cpus=8,
        num_gpus=2,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    yield
    ray.shutdown()
