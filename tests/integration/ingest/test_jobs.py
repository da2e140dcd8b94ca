"""One job in the cluster, whatever happens to the processes that run it."""

import asyncio
import contextlib
import os
import random
import resource
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from serverlessllm.checkpoint.index import decode_index
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import JobRecord, JobStage
from serverlessllm.core.errors import (
    Conflict,
    Draining,
    Fenced,
    ModelNotFound,
    OutOfSpace,
    StoreUnavailable,
    TooManyRequests,
)
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelRecord
from serverlessllm.core.units import MIB, TIB
from serverlessllm.ingest.errors import WorkerCrashed
from serverlessllm.ingest.process import WorkerProcess
from serverlessllm.metadata.registry import JobClaim
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.checkpoints import write_random_gguf, write_random_safetensors
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.hub import Faults, HubServer
from serverlessllm.testing.ingestions import MODEL, Cluster, spec_of
from serverlessllm.testing.waiting import eventually

SPEC = spec_of("hf://org/name")


class Workers:
    """Every converter process that was started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pids: list[int] = []
        self.file_bytes_max: int | None = None
        """The disk of the next one seems full beyond this."""
        enter = WorkerProcess.__aenter__

        async def noting(worker: WorkerProcess) -> WorkerProcess:
            entered = await enter(worker)
            self.pids.append(worker.pid)
            if self.file_bytes_max is not None:
                hard = resource.RLIM_INFINITY
                resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (self.file_bytes_max, hard))
            return entered

        monkeypatch.setattr(WorkerProcess, "__aenter__", noting)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(self.pids[-1], signal.SIGKILL)

    @property
    def alive(self) -> list[int]:
        return [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


def publish_small(hub: HubServer, tmp_path: Path) -> None:
    folder = write_random_safetensors(tmp_path / "raw")
    hub.add("org/name", {path.name: path for path in folder.iterdir()})


def publish_big(hub: HubServer, tmp_path: Path) -> int:
    """A model of several chunks; its size."""
    path = write_random_gguf(tmp_path / "big.gguf", layers=2, width=1024)
    hub.add("org/name", {"big.gguf": path})
    assert path.stat().st_size > 3 * 16 * MIB
    return path.stat().st_size


async def reached(cluster: Cluster, stage: JobStage) -> JobRecord:
    """The job's record once it has got to `stage`, as the rest of the cluster sees it."""
    registry = cluster.registry()
    snapshot = await registry.snapshot()
    for job in snapshot.jobs:
        if job.stage is stage:
            return job
    async with contextlib.aclosing(registry.watch(snapshot.revision)) as changes:
        async for change in changes:
            job_now = getattr(change, "job", None)
            if isinstance(job_now, JobRecord) and job_now.stage is stage:
                return job_now
    raise AssertionError("the watch ended")


async def test_fifty_callers_cause_one_job(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    ingestion = await cluster.join()
    seen: list[JobRecord] = []
    records = await asyncio.gather(*(ingestion.ensure(MODEL, SPEC, seen.append) for _ in range(50)))
    assert len(set(map(msgspec.json.encode, records))) == 1
    assert len(workers.pids) == 1
    assert hub.requests["api"] == 1
    assert {job.stage for job in seen} >= {JobStage.RESOLVING, JobStage.CONVERTING, JobStage.DONE}
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert workers.alive == []
    job = await cluster.registry().get_job(MODEL)
    assert job is not None
    assert job.stage is JobStage.DONE


async def test_what_is_there_is_not_made_again(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    ingestion = await cluster.join()
    first = await ingestion.ensure(MODEL, SPEC)
    assert await ingestion.ensure(MODEL, SPEC) == first
    assert len(workers.pids) == 1


async def test_a_checkpoint_in_the_store_is_adopted_without_fetching_it(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    ingestion = await cluster.join()
    first = await ingestion.ensure(MODEL, SPEC)
    await cluster.registry().delete_model(MODEL)
    fetched = hub.requests["file"]
    again = await ingestion.ensure(MODEL, SPEC)
    assert again.checkpoint == first.checkpoint
    assert hub.requests["file"] == fetched
    assert cluster.leftovers == []


async def test_a_caller_that_leaves_kills_nothing(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    hub.gate.clear()
    ingestion = await cluster.join()
    leaving = asyncio.create_task(ingestion.ensure(MODEL, SPEC))
    staying = asyncio.create_task(ingestion.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.CONVERTING)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    hub.gate.set()
    await cluster.check(await staying)
    assert len(workers.pids) == 1


async def test_the_job_goes_on_when_everybody_left(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    hub.gate.clear()
    ingestion = await cluster.join()
    leaving = asyncio.create_task(ingestion.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.CONVERTING)
    leaving.cancel()
    hub.gate.set()
    await reached(cluster, JobStage.DONE)
    stored = await cluster.registry().get_model(MODEL)
    assert stored is not None
    await cluster.check(stored.record)


async def test_all_waiters_get_the_same_error_and_so_does_who_comes_soon(
    cluster: Cluster, hub: HubServer
) -> None:
    clock = VirtualClock()
    ingestion = await cluster.join(clock=clock)
    results = await asyncio.gather(
        *(ingestion.ensure(MODEL, SPEC) for _ in range(5)), return_exceptions=True
    )
    assert {type(result) for result in results} == {ModelNotFound}
    assert len({id(result) for result in results}) == 5
    asked = hub.requests["fault"]
    with pytest.raises(ModelNotFound):
        await ingestion.ensure(MODEL, SPEC)
    assert hub.requests["fault"] == asked
    await clock.advance(5.1)
    with pytest.raises(ModelNotFound):
        await ingestion.ensure(MODEL, SPEC)
    assert hub.requests["fault"] > asked
    job = await cluster.registry().get_job(MODEL)
    assert job is not None
    assert job.error is not None
    assert job.error.code == "model_not_found"


async def test_a_failure_is_no_answer_for_another_source(cluster: Cluster, tmp_path: Path) -> None:
    ingestion = await cluster.join()
    with pytest.raises(ModelNotFound):
        await ingestion.ensure(MODEL, SPEC)
    path = write_random_gguf(tmp_path / "tiny.gguf")
    await cluster.check(await ingestion.ensure(MODEL, spec_of(f"file://{path}")))


async def test_another_source_at_the_same_time_is_a_conflict(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    hub.gate.clear()
    ingestion = await cluster.join()
    running = asyncio.create_task(ingestion.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.CONVERTING)
    with pytest.raises(Conflict):
        await ingestion.ensure(MODEL, spec_of("hf://org/other"))
    hub.gate.set()
    await running


async def test_more_jobs_than_allowed_are_refused(cluster: Cluster, hub: HubServer) -> None:
    hub.gate.clear()
    ingestion = await cluster.join(
        msgspec.structs.replace(cluster.settings, jobs_waiting_max=1, jobs_max=1)
    )
    first = asyncio.create_task(ingestion.ensure(MODEL, SPEC))
    await asyncio.sleep(0)
    with pytest.raises(TooManyRequests) as raised:
        await ingestion.ensure(ModelId("org/b"), spec_of("hf://org/b", ModelId("org/b")))
    assert raised.value.retry_after_s
    first.cancel()


@pytest.mark.parametrize("by", ["hf", "file"])
async def test_a_converter_killed_in_the_middle_changes_nothing(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path, by: str
) -> None:
    """Killed twice after some chunk: the bytes are those of an unharmed run."""
    size = publish_big(hub, tmp_path)
    ingestion = await cluster.join()
    moments = [16 * MIB, size // 2]

    def kill(record: JobRecord) -> None:
        if moments and record.stage is JobStage.CONVERTING and record.bytes_done >= moments[0]:
            moments.pop(0)
            workers.kill()

    spec = SPEC if by == "hf" else spec_of(f"file://{tmp_path}/big.gguf")
    record = await ingestion.ensure(MODEL, spec, kill)
    assert len(workers.pids) > 1
    await expect_unharmed(cluster, record, tmp_path / "big.gguf")
    assert workers.alive == []


async def test_an_upload_goes_on_right_after_a_killed_converter(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    """A store that nothing can be linked into: it is sent the file in parts, as it grows."""
    size = publish_big(hub, tmp_path)
    store = open_store("memory://", StoreSettings(part_bytes=MIB), SystemClock())
    ingestion = await cluster.join(store=store)
    moments = [16 * MIB]

    def kill(record: JobRecord) -> None:
        if moments and record.stage is JobStage.CONVERTING and record.bytes_done >= moments[0]:
            moments.pop()
            workers.kill()

    record = await ingestion.ensure(MODEL, spec_of(f"file://{tmp_path}/big.gguf"), kill)
    assert len(workers.pids) == 2
    assert record.checkpoint is not None
    published = await store.read_range(record.checkpoint.prefix, 0, size)
    assert published == (tmp_path / "big.gguf").read_bytes()
    assert cluster.leftovers == []


@pytest.mark.parametrize("seed", range(3))
async def test_a_converter_killed_at_any_time_changes_nothing(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path, seed: int
) -> None:
    path = write_random_gguf(tmp_path / "tiny.gguf")
    ingestion = await cluster.join(msgspec.structs.replace(cluster.settings, worker_crashes_max=10))
    chance = random.Random(seed)
    loop = asyncio.get_running_loop()
    kills = [loop.call_later(chance.uniform(0.0, 1.0), workers.kill) for _ in range(4)]
    record = await ingestion.ensure(MODEL, spec_of(f"file://{path}"))
    for kill in kills:
        kill.cancel()
    await expect_unharmed(cluster, record, path)


async def expect_unharmed(cluster: Cluster, record: ModelRecord, source: Path) -> None:
    await cluster.check(record)
    assert record.checkpoint is not None
    assert cluster.store.root is not None
    published = cluster.store.root / record.checkpoint.prefix / "model.bin"
    assert published.read_bytes() == source.read_bytes()
    assert cluster.leftovers == []


async def test_a_converter_that_always_dies_is_given_up(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    hub.gate.clear()
    ingestion = await cluster.join()

    def kill(record: JobRecord) -> None:
        if record.stage is JobStage.CONVERTING:
            workers.kill()

    with pytest.raises(WorkerCrashed, match="3 times"):
        await ingestion.ensure(MODEL, SPEC, kill)
    assert len(workers.pids) == cluster.settings.worker_crashes_max
    assert await cluster.store.list() == ()


async def test_a_silent_converter_is_killed(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    hub.gate.clear()
    settings = msgspec.structs.replace(
        cluster.settings, worker_silence_s_max=0.5, worker_crashes_max=1
    )
    ingestion = await cluster.join(settings)
    with pytest.raises(WorkerCrashed):
        await ingestion.ensure(MODEL, SPEC)
    assert workers.alive == []


async def test_two_processes_share_one_job(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    hub.gate.clear()
    one, two = await cluster.join(), await cluster.join()
    seen: list[JobRecord] = []
    owner = asyncio.create_task(one.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.CONVERTING)
    follower = asyncio.create_task(two.ensure(MODEL, SPEC, seen.append))
    await asyncio.sleep(0)
    hub.gate.set()
    assert await owner == await follower
    assert len(workers.pids) == 1
    assert len({job.owner for job in seen}) <= 1


async def test_a_follower_gets_the_owner_s_error(cluster: Cluster, hub: HubServer) -> None:
    hub.faults = Faults(latency_s=0.3)
    one, two = await cluster.join(), await cluster.join()
    owner = asyncio.create_task(one.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.RESOLVING)
    results = await asyncio.gather(owner, two.ensure(MODEL, SPEC), return_exceptions=True)
    assert [type(result) for result in results] == [ModelNotFound, ModelNotFound]
    assert hub.requests["fault"] == 1


async def test_a_closing_process_hands_its_job_over(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_big(hub, tmp_path)
    hub.gate.clear()
    one, two = await cluster.join(), await cluster.join()
    owner = asyncio.create_task(one.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.CONVERTING)
    follower = asyncio.create_task(two.ensure(MODEL, SPEC))
    await one.close()
    with pytest.raises(Draining):
        await owner
    with pytest.raises(Draining):
        await one.ensure(MODEL, SPEC)
    hub.gate.set()
    await cluster.check(await follower)
    assert len(workers.pids) == 2
    assert cluster.leftovers == []


async def test_a_lost_claim_stops_before_publishing(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    hub.gate.clear()
    ingestion = await cluster.join()
    lost = asyncio.Event()

    def look(job: JobRecord) -> None:
        if job.owner == "another":
            lost.set()

    caller = asyncio.create_task(ingestion.ensure(MODEL, SPEC, look))
    await reached(cluster, JobStage.CONVERTING)
    registry = cluster.registry()
    assert await cluster.metadata().delete(f"jobs/ingest/{MODEL}")
    taken = await registry.claim_job(MODEL, "another", 30.0)
    assert isinstance(taken, JobClaim)
    hub.gate.set()
    async with asyncio.timeout(60):
        await lost.wait()
    assert workers.alive == []
    assert await cluster.store.list() == ()
    assert await registry.get_model(MODEL) is None
    await registry.release_job(taken)  # the other one dies: ours goes on
    await cluster.check(await caller)
    assert cluster.leftovers == []


async def test_an_owner_that_is_lost_again_and_again_is_an_error(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    """A process whose clock stands still cannot keep a lease."""
    publish_small(hub, tmp_path)
    settings = msgspec.structs.replace(cluster.settings, lease_s=0.05, claims_max=2)
    ingestion = await cluster.join(settings, clock=VirtualClock())
    with pytest.raises(Fenced):
        await ingestion.ensure(MODEL, SPEC)
    assert await cluster.store.list() == ()


async def test_a_store_that_goes_away_fails_the_job_and_the_next_goes_on(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    ingestion = await cluster.join(msgspec.structs.replace(cluster.settings, failure_cache_s=0.0))
    assert cluster.store.root is not None
    original = cluster.store.objects.put_new

    async def fail(path: str, data: bytes) -> None:
        raise StoreUnavailable("the store is away")

    cluster.store.objects.put_new = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable):
        await ingestion.ensure(MODEL, SPEC)
    assert len(cluster.leftovers) == 1
    assert list(cluster.store.root.iterdir()) == []
    cluster.store.objects.put_new = original  # type: ignore[method-assign]
    fetched = hub.bytes_sent
    await cluster.check(await ingestion.ensure(MODEL, SPEC))
    assert cluster.leftovers == []
    assert hub.bytes_sent - fetched < fetched


async def test_no_room_is_said_before_anything_is_fetched(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    ingestion = await cluster.join(
        msgspec.structs.replace(cluster.settings, space_margin_bytes=1024 * TIB)
    )
    with pytest.raises(OutOfSpace, match="free"):
        await ingestion.ensure(MODEL, SPEC)
    assert cluster.leftovers == []
    assert await cluster.store.list() == ()


async def test_a_disk_that_fills_up_leaves_nothing(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    workers.file_bytes_max = 50_000
    ingestion = await cluster.join()
    with pytest.raises(OutOfSpace):
        await ingestion.ensure(MODEL, SPEC)
    assert cluster.leftovers == []
    assert await cluster.store.list() == ()
    assert cluster.store.root is not None
    assert list(cluster.store.root.iterdir()) == []


async def test_the_operator_s_spec_is_kept(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    spec = msgspec.structs.replace(SPEC, aliases=("small",), keep_alive_s=7.0)
    await cluster.registry().put_model(ModelRecord(spec=spec))
    ingestion = await cluster.join()
    record = await ingestion.ensure(MODEL, SPEC)
    assert record.spec == spec
    assert record.created_s > 0


async def test_a_model_deleted_during_its_ingest_does_not_come_back(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    registry = cluster.registry()
    await registry.put_model(ModelRecord(spec=SPEC))
    hub.gate.clear()
    ingestion = await cluster.join()
    caller = asyncio.create_task(ingestion.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.CONVERTING)
    await registry.delete_model(MODEL)
    hub.gate.set()
    with pytest.raises(ModelNotFound, match="deleted"):
        await caller
    assert await registry.get_model(MODEL) is None
    assert cluster.leftovers == []


async def test_a_model_deleted_before_its_ingest_s_turn_does_not_come_back(
    cluster: Cluster, hub: HubServer, workers: Workers, tmp_path: Path
) -> None:
    publish_small(hub, tmp_path)
    registry = cluster.registry()
    other = ModelId("org/other")
    await registry.put_model(ModelRecord(spec=spec_of("hf://org/name", other)))
    hub.gate.clear()
    ingestion = await cluster.join(msgspec.structs.replace(cluster.settings, jobs_max=1))
    first = asyncio.create_task(ingestion.ensure(MODEL, SPEC))
    await reached(cluster, JobStage.CONVERTING)
    waiting = asyncio.create_task(ingestion.ensure(other, spec_of("hf://org/name", other)))
    await eventually(lambda: ingestion._runner.turns._waiters)
    await registry.delete_model(other)
    hub.gate.set()
    await first
    with pytest.raises(ModelNotFound, match="deleted"):
        await waiting
    assert await registry.get_model(other) is None
    assert len(workers.pids) == 1


async def test_a_killed_process_leaves_no_converter_and_its_work_is_gone_on_with(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    publish_big(hub, tmp_path)
    hub.faults = Faults(bytes_s=20e6)  # so that it is still at it when it is killed
    settings = msgspec.structs.replace(cluster.settings, lease_s=0.5)
    program = f"""
import asyncio, msgspec
from pathlib import Path
from contextlib import AsyncExitStack
from serverlessllm.testing.ingestions import *
from serverlessllm.ingest.settings import IngestSettings

class Hub: url = {hub.url!r}

async def main():
    async with AsyncExitStack() as stack:
        cluster = Cluster(Path({str(cluster.folder)!r}), Hub(), stack)
        settings = msgspec.json.decode({msgspec.json.encode(settings)!r}, type=IngestSettings)
        ingestion = await cluster.join(settings)
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    await reached(cluster, JobStage.CONVERTING)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    await process.wait()
    hub.faults = Faults()
    await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert await cluster.store.list() == ()
    ingestion = await cluster.join(settings)
    record = await ingestion.ensure(MODEL, SPEC)
    decode_index(await cluster.check(record))
    assert cluster.leftovers == []
