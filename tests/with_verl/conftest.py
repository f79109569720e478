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
from reference import ADAM, Reference, make_reference  # noqa: E402
from verl.single_controller.ray import RayWorkerGroup  # noqa: E402
from workers import critic_workers  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Eight places for workers, which verl takes for GPUs."""
    ray.init(
        num_cpus=32,
        num_gpus=8,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("critic"), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def one_rank(cluster: None, reference: Reference) -> Iterator[RayWorkerGroup]:
    how = {"enable_gradient_checkpointing": True}
    with critic_workers(reference.folder, reference.objective, ranks=1, optimiser=ADAM, **how) as group:
        yield group


@pytest.fixture(scope="session")
def two_ranks(cluster: None, reference: Reference) -> Iterator[RayWorkerGroup]:
    with critic_workers(reference.folder, reference.objective, ranks=2, optimiser=ADAM) as group:
        yield group
