"""One S3 server and one local Ray cluster for all tests of this folder; tests/conftest.py has set their environment."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import SeaweedServer, served

HERE = Path(__file__).parent
# What the scheduler counts, not what the machine has: a job's readers, teachers and workers must all find a place,
# or Ray Data waits for one in silence.
LOGICAL_CPUS = 8
OBJECT_STORE_BYTES = 512 * 2**20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def s3() -> Iterator[SeaweedServer]:
    """Yield a real S3 server with the empty bucket `s3.bucket`; its credentials are in this process's environment."""
    with served() as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster(s3: SeaweedServer) -> Iterator[str]:
    """Yield the address of a new one-node cluster, whose workers inherit the credentials of the running S3 server."""
    import ray

    # Not pytest's tmp_path: session name and socket are added to it, and a Unix socket's path ends at 107 bytes.
    directory = tempfile.mkdtemp(prefix="ray-")
    context = ray.init(
        address="local",  # never join a cluster that happens to run here
        num_cpus=LOGICAL_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level="warning",
        _temp_dir=directory,
    )
    yield context.address_info["address"]
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
