from pathlib import Path

import pytest

from serverlessllm.core.errors import InvalidRequest, SLLMError, StoreUnavailable
from serverlessllm.core.ids import ModelId
from serverlessllm.store.errors import StoreMisconfigured
from serverlessllm.store.layout import check_prefix, prefix_of
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.clock import VirtualClock

SETTINGS = StoreSettings(
    allow_http=True,
    region="us-east-1",
    options={"access_key_id": "KEYKEY", "secret_access_key": "SECRET"},
)


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("ftp://host/x", "s3://"),
        ("/just/a/path", "file://"),
        ("s3://", "bucket"),
        ("file://host/x", "file:///"),
        ("", "file://"),
    ],
)
def test_a_url_that_is_no_store_says_what_to_write(url: str, part: str) -> None:
    with pytest.raises(StoreMisconfigured, match=part):
        open_store(url, SETTINGS, VirtualClock())


@pytest.mark.parametrize("url", ["s3://bucket/folder", "az://container", "gs://bucket"])
def test_every_cloud_opens_without_asking_it(url: str) -> None:
    options = {
        "az": {"account_name": "name", "account_key": "a2V5"},
        "gs": {"skip_signature": "true"},
    }.get(url[:2], SETTINGS.options)
    store = open_store(url, StoreSettings(options=options, region="us-east-1"), VirtualClock())
    assert store.where == url.removesuffix("/folder")
    assert store.root is None


def test_an_option_that_the_store_does_not_know_is_refused() -> None:
    with pytest.raises(StoreMisconfigured, match=r"store\.options"):
        open_store("s3://b", StoreSettings(options={"acess_key": "x"}), VirtualClock())


def test_a_folder_is_made(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20b/c", SETTINGS, VirtualClock())
    assert store.root == tmp_path / "a b" / "c"
    assert store.root.is_dir()


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SLLMError, match="file://"):
        open_store(f"file://{tmp_path}/file/store", SETTINGS, VirtualClock())


async def test_an_unreachable_store_says_where_and_what_to_check() -> None:
    settings = StoreSettings(
        allow_http=True,
        endpoint="http://127.0.0.1:9",
        region="us-east-1",
        options=SETTINGS.options,
        tries=1,
    )
    store = open_store("s3://models", settings, VirtualClock())
    with pytest.raises(StoreUnavailable, match=r"s3://models at 127\.0\.0\.1:9.*check") as raised:
        await store.head("m/r")
    assert "SECRET" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("prefix", ["m", "../x", "/m/r", "m/../r", "m/r/", "a/b/c/d", "m/.r", ""])
def test_a_prefix_cannot_leave_the_store(prefix: str) -> None:
    with pytest.raises(InvalidRequest):
        check_prefix(prefix)


def test_a_revision_becomes_part_of_the_prefix() -> None:
    assert prefix_of(ModelId("org/name@v1"), "abc") == "org/name/abc"
    assert prefix_of(ModelId("name"), "a/b c") == "name/a-b-c"
