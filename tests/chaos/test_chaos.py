"""Whole jobs under a schedule of kills and a failing store: nothing is lost, nothing is doubled, nothing is changed."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from betakd_ray.data.pack import pack
from betakd_ray.run.audit import audit
from betakd_ray.run.metrics import read_metrics
from betakd_ray.spec import JobSpec, StorageSpec
from betakd_ray.storage import join
from tests.chaos.jobs import SHARDS, disturbed_job, save_models
from tests.chaos.storm import Storm
from tests.nodes import Nodes, nodes
from tests.s3 import SeaweedServer, served
from tests.s3_proxy import FaultyS3
from tests.tiny import numbered_samples

SAMPLES, EPOCHS, BATCH = 600, 2, 6
EVENTS = (
    "kill_teacher",
    "kill_pool",
    "kill_worker",
    "kill_monitor",
    "lose_teacher_node",
    "lose_student_node",
    "reclaim_student_node",
    "lose_store",
    "kill_driver",
    "end_driver",
    "stop_worker",
)
FAULT_RATE = 0.02
"""Share of the requests to the store that fail."""


@pytest.fixture(scope="session")
def s3() -> Iterator[SeaweedServer]:
    with served() as server:
        yield server


@pytest.fixture(scope="session")
def data(s3: SeaweedServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards into the store; return the folder with the models."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    storage = StorageSpec(endpoint_url=s3.endpoint_url)
    pack(numbered_samples(SAMPLES, broken=40), f"s3://{s3.bucket}/{SHARDS}", samples_per_shard=67, storage=storage)
    return folder


@pytest.fixture(scope="session")
def cluster(s3: SeaweedServer) -> Iterator[Nodes]:
    with nodes({"teacher": 1, "student": 2}) as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed(s3: SeaweedServer, data: Path, cluster: Nodes) -> list[float]:
    """Return the losses of the job without failures, on one worker."""
    spec = _spec(s3, s3.endpoint_url, data, "undisturbed", workers=1)
    with Storm(spec, cluster, seed=0) as storm:
        storm.run([])
    return _losses(spec)


@pytest.mark.timeout(1500)
def test_a_storm_changes_nothing(
    seed: int, s3: SeaweedServer, data: Path, cluster: Nodes, undisturbed: list[float]
) -> None:
    """Even seeds use one worker, so the order of samples is fixed, and with it the losses.

    Odd seeds use as many workers as there is room for, at most two; then the order is not fixed.
    """
    draw = random.Random(seed)
    is_elastic = bool(seed % 2)
    events = draw.sample(EVENTS, 3)
    events.sort(key="reclaim_student_node".__eq__)  # last: nothing holds the job up while its notice runs
    workers = {"min": 1, "max": 2} if is_elastic else 1
    with FaultyS3(s3, seed=seed, rate=FAULT_RATE) as proxy:
        spec = _spec(s3, proxy.endpoint_url, data, f"storm-{seed}", workers=workers)
        with Storm(spec, cluster, seed, proxy) as storm:
            storm.run(events)
        # A much faster machine may be done before the last.
        assert storm.befell.total() >= 2, f"only {dict(storm.befell)} befell it: the job is too short"
        print(f"seed {seed}: {dict(storm.befell)}; of the store: {dict(proxy.faults_injected)}")
    spec = _spec(s3, s3.endpoint_url, data, f"storm-{seed}", workers=workers)
    found = audit(join(spec.output.path, spec.name), spec.output.storage)
    assert found.problems == []
    losses = _losses(spec)
    if is_elastic:
        assert _end(losses) == pytest.approx(_end(undisturbed), rel=0.1)
    else:
        assert losses == pytest.approx(undisturbed, rel=1e-5)


def _end(losses: list[float]) -> float:
    """Return the mean loss of the last quarter."""
    last = losses[-len(losses) // 4 :]
    return sum(last) / len(last)


def _losses(spec: JobSpec) -> list[float]:
    return [record["loss"] for record in read_metrics(join(spec.output.path, spec.name), spec.output.storage)]


def _spec(s3: SeaweedServer, endpoint_url: str, data: Path, name: str, workers: object) -> JobSpec:
    storage = {"endpoint_url": endpoint_url, "region": "us-east-1"}
    return disturbed_job(
        name, s3.bucket, data, storage, epochs=EPOCHS, workers=workers, checkpoint_every=10, global_batch_size=BATCH
    )
