"""Each kind of source, through the real worker, to a checkpoint that verifies."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import obstore
import pytest

from serverlessllm.checkpoint.index import decode_index
from serverlessllm.core.errors import (
    CheckpointError,
    ClientError,
    ModelNotFound,
    SLLMError,
    SourceUnavailable,
    UnsupportedCheckpoint,
)
from serverlessllm.core.units import MIB
from serverlessllm.ingest.errors import SourceDenied
from serverlessllm.ingest.remote import Fetcher
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.ingest.sources import open_source
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.checkpoints import write_random_gguf, write_random_safetensors
from serverlessllm.testing.hub import Faults, HubServer
from serverlessllm.testing.ingestions import MODEL, SETTINGS, Cluster, spec_of
from serverlessllm.testing.s3 import S3Server, s3_server
from serverlessllm.testing.torch_files import state_dict, storage, tensor, text, torch_zip


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def raw_files(folder: Path, **options: object) -> dict[str, bytes | Path]:
    made = write_random_safetensors(folder, **options)  # type: ignore[arg-type]
    return {path.name: path for path in made.iterdir()}


async def test_a_gguf_file_is_published_as_it_is(cluster: Cluster, tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "tiny.gguf")
    ingestion = await cluster.join()
    record = await ingestion.ensure(MODEL, spec_of(f"file://{path}"))
    idx = decode_index(await cluster.check(record))
    assert record.checkpoint is not None
    assert cluster.store.root is not None
    published = cluster.store.root / record.checkpoint.prefix / "model.bin"
    assert published.read_bytes() == path.read_bytes()
    assert idx.kind == "gguf"
    assert str(tmp_path) not in idx.source
    assert cluster.leftovers == []


async def test_a_folder_again_is_the_same_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    raw_files(tmp_path / "raw", shards=2)
    ingestion = await cluster.join()
    first = await ingestion.ensure(MODEL, spec_of(f"file://{tmp_path}/raw"))
    idx = await cluster.check(first)
    assert first.checkpoint is not None
    await cluster.store.delete(first.checkpoint.prefix)
    again = await ingestion.ensure(MODEL, spec_of(f"file://{tmp_path}/raw"))
    assert await cluster.check(again) == idx


@pytest.mark.parametrize("redirect", [False, True])
async def test_a_hub_model_is_pinned_to_its_commit(
    cluster: Cluster, hub: HubServer, tmp_path: Path, redirect: bool
) -> None:
    commit = hub.add("org/name", raw_files(tmp_path / "raw", shards=3))
    hub.faults = Faults(redirect=redirect)
    ingestion = await cluster.join()
    record = await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    index = decode_index(await cluster.check(record))
    assert record.checkpoint is not None
    assert record.checkpoint.prefix == f"org/name/{commit}"
    assert (index.source, index.revision, index.license) == ("hf://org/name", commit, "apache-2.0")
    assert cluster.leftovers == []


async def test_a_hub_file_and_a_revision_can_be_named(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    small = write_random_gguf(tmp_path / "a.gguf", seed=1)
    other = write_random_gguf(tmp_path / "b.gguf", seed=2)
    commit = hub.add("org/name", {"tiny-Q4.gguf": small, "tiny-Q8.gguf": other})
    ingestion = await cluster.join()
    with pytest.raises(CheckpointError, match="name one of them"):
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    record = await ingestion.ensure(MODEL, spec_of(f"hf://org/name@{commit}/tiny-Q8.gguf"))
    await cluster.check(record)
    assert record.checkpoint is not None
    assert record.checkpoint.size_bytes == other.stat().st_size
    # Only the named file was fetched, and hardly more than once (its header is read first).
    assert hub.bytes_sent < 1.5 * other.stat().st_size


async def test_a_folder_of_a_bucket(cluster: Cluster, s3: S3Server, tmp_path: Path) -> None:
    folder = uuid.uuid4().hex
    bucket = obstore.store.S3Store(
        s3.bucket,
        prefix=folder,
        endpoint=s3.endpoint,
        region="us-east-1",
        access_key_id=s3.access_key,
        secret_access_key=s3.secret_key,
        client_options={"allow_http": True},
    )
    for name, content in raw_files(tmp_path / "raw", shards=2).items():
        bucket.put(name, content if isinstance(content, bytes) else content.read_bytes())
    bucket.put("nested/other.safetensors", b"not ours")
    settings = msgspec.structs.replace(cluster.settings, sources=s3.settings)
    ingestion = await cluster.join(settings)
    record = await ingestion.ensure(MODEL, spec_of(f"{s3.url}/{folder}"))
    await cluster.check(record)
    with pytest.raises(ModelNotFound):
        await ingestion.ensure(MODEL, spec_of(f"{s3.url}/empty"))


async def test_a_big_file_is_fetched_in_ranges_about_once(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    path = write_random_gguf(tmp_path / "big.gguf", layers=1, width=1024)
    size = path.stat().st_size
    assert size > 24 * MIB
    hub.add("org/name", {"big.gguf": path})
    settings = msgspec.structs.replace(
        cluster.settings, block_bytes=MIB, read_ahead_blocks=4, cached_blocks=40
    )
    ingestion = await cluster.join(settings)
    await cluster.check(await ingestion.ensure(MODEL, spec_of("hf://org/name")))
    assert hub.requests["file"] >= size // MIB
    assert hub.bytes_sent < 1.2 * size


async def test_a_cut_body_is_asked_for_again(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    hub.add("org/name", raw_files(tmp_path / "raw"))
    hub.faults = Faults(cut_bytes=100, files_only=True, times=2)
    ingestion = await cluster.join()
    await cluster.check(await ingestion.ensure(MODEL, spec_of("hf://org/name")))
    assert hub.requests["fault"] == 2


HUB_REFUSALS: list[tuple[Faults, type[SLLMError], str]] = [
    (Faults(status=404), ModelNotFound, "no org/name"),
    (Faults(status=401), ModelNotFound, "HF_TOKEN"),  # what the hub says of what is not there
    (Faults(status=403), SourceDenied, "HF_TOKEN"),
    (Faults(status=429), SourceUnavailable, "429"),
    (Faults(status=500), SourceUnavailable, "500"),
    (Faults(status=403, files_only=True), SourceDenied, "HF_TOKEN"),
    (Faults(status=429, files_only=True), SourceUnavailable, "429"),
    (Faults(cut_bytes=10, files_only=True), SourceUnavailable, "cut"),
]


def read_all(source: str, settings: IngestSettings) -> None:
    """What the worker does with a source, in this process: start-up is most of a worker's time."""
    with Fetcher(settings) as fetcher:
        raw = open_source(source, MODEL, settings, fetcher)
        for file in raw.files.values():
            file.read_into(0, memoryview(bytearray(file.size_bytes)))


@pytest.mark.parametrize(("faults", "kind", "says"), HUB_REFUSALS)
def test_a_hub_that_refuses_is_a_typed_error(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: Faults,
    kind: type[SLLMError],
    says: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.add("org/name", raw_files(tmp_path / "raw"))
    hub.faults = msgspec.structs.replace(faults, redirect=faults.files_only)
    with pytest.raises(kind, match=says) as raised:
        read_all("hf://org/name", SETTINGS)
    assert type(raised.value) is kind
    assert HubServer.SECRET not in raised.value.message
    assert "http://" not in raised.value.message


async def test_a_bad_token_and_a_gated_model_say_so(
    cluster: Cluster, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", raw_files(tmp_path / "raw"), gated=True)
    ingestion = await cluster.join(msgspec.structs.replace(cluster.settings, failure_cache_s=0.0))
    with pytest.raises(SourceDenied, match="HF_TOKEN"):
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    hub.faults = Faults(status=401)
    with pytest.raises(SourceDenied, match="HF_TOKEN") as raised:
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    assert "sesame" not in raised.value.message
    hub.faults = Faults()
    await cluster.check(await ingestion.ensure(MODEL, spec_of("hf://org/name")))
    assert hub.tokens == {"Bearer hf_sesame"}


async def test_an_unreachable_hub_names_its_host(cluster: Cluster) -> None:
    settings = msgspec.structs.replace(cluster.settings, hub_endpoint="http://127.0.0.1:9")
    ingestion = await cluster.join(settings)
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1:9.*HF_ENDPOINT"):
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("hf://org/unknown", ModelNotFound, "org/unknown"),
        ("hf://org/name@nope", ModelNotFound, "revision 'nope'"),
        ("hf://org/name/nope.gguf", ModelNotFound, "nope.gguf"),
        ("hf://name", ClientError, "hf://org/name"),
        ("hf://org/../etc", ClientError, "hf://org/name"),
        ("file:///no/such/folder", ModelNotFound, "folder"),
        ("ftp://host/x", ClientError, "s3://"),
        ("s3://bucket/x", SourceUnavailable, "s3://bucket"),
    ],
)
def test_a_source_that_is_not_there(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    kind: type[SLLMError],
    says: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.add("org/name", raw_files(tmp_path / "raw"))
    nowhere = StoreSettings(
        endpoint="http://127.0.0.1:9",
        allow_http=True,
        region="us-east-1",
        options={"access_key_id": "k", "secret_access_key": "s"},
        tries=1,
    )
    with pytest.raises(kind, match=says):
        read_all(source, IngestSettings(sources=nowhere))


async def test_pytorch_files_of_the_hub_are_converted(cluster: Cluster, hub: HubServer) -> None:
    """Only the weights are asked for, and no optimizer."""
    tensors = {f"model.layers.{n}.w": tensor(storage(key=text(str(n)))) for n in range(4)}
    storages = {str(n): bytes([n]) * 16 for n in range(4)}
    weights = torch_zip(state_dict(tensors), storages)
    files = {"config.json": b"{}", "pytorch_model.bin": weights, "optimizer.pt": os.urandom(99)}
    commit = hub.add("org/name", files)
    ingestion = await cluster.join()
    record = await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    index = decode_index(await cluster.check(record))
    assert [found.name for found in index.tensors] == list(tensors)
    assert (index.source, index.revision) == ("hf://org/name", commit)
    assert cluster.leftovers == []


async def test_a_repository_of_pickles_is_refused_with_the_way_out(
    cluster: Cluster, hub: HubServer
) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.pkl": os.urandom(1000)})
    ingestion = await cluster.join()
    with pytest.raises(UnsupportedCheckpoint, match="safetensors"):
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    assert hub.requests["file"] == 0
    assert cluster.leftovers == []


async def test_a_lying_header_leaves_nothing(cluster: Cluster, hub: HubServer) -> None:
    lying = (1 << 40).to_bytes(8, "little") + b"{}" * 100
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": lying})
    ingestion = await cluster.join()
    with pytest.raises(CheckpointError):
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    assert await cluster.store.list() == ()
    assert cluster.leftovers == []


async def test_too_large_a_source_is_refused_before_it_is_fetched(
    cluster: Cluster, hub: HubServer, tmp_path: Path
) -> None:
    hub.add("org/name", raw_files(tmp_path / "raw"))
    ingestion = await cluster.join(IngestSettings(hub_endpoint=hub.url, source_bytes_max=1000))
    with pytest.raises(ClientError, match="source_bytes_max"):
        await ingestion.ensure(MODEL, spec_of("hf://org/name"))
    assert hub.requests["file"] == 0
