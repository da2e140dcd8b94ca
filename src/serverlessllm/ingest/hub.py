"""`hf://org/name[@revision][/file.gguf]`: the hub's API by its own library, bytes by ranges.

`huggingface_hub` resolves names, revisions and tokens; the bytes come through the same native
HTTP client as a store's, which is several times faster than the library's and as bounded.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import msgspec
from obstore.store import HTTPStore

from serverlessllm.checkpoint.sources.base import RawCheckpoint, RawFile
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import (
    InvalidRequest,
    ModelNotFound,
    SLLMError,
    SourceUnavailable,
)
from serverlessllm.core.ids import ModelId, model_name
from serverlessllm.ingest.errors import SourceDenied
from serverlessllm.ingest.remote import Fetcher, RemoteFile
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.store.objects import Objects

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo
    from obstore.store import ClientConfig

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_SOURCE = re.compile(
    rf"hf://(?P<repo>{_PART}/{_PART}?)(?:@(?P<revision>[A-Za-z0-9._-]+))?(?:/(?P<file>{_PART}))?"
)
_RETRY_AFTER_S_MAX = 120.0
_BAD_TOKEN = "Invalid credentials in Authorization header"  # noqa: S105 - the hub's own words


class HubName(msgspec.Struct, frozen=True, kw_only=True):
    """A hub source taken apart."""

    repo: str
    revision: str | None
    file: str | None


def parse_hub_source(source: str) -> HubName:
    """Raises InvalidRequest."""
    match = _SOURCE.fullmatch(source)
    if match is None or ".." in source:
        raise InvalidRequest(
            f"source {source[:200]!r}: write hf://org/name[@revision][/file.gguf]", param="source"
        )
    return HubName(repo=match["repo"], revision=match["revision"], file=match["file"])


def open_hub(
    source: str, model: ModelId, settings: IngestSettings, fetcher: Fetcher
) -> RawCheckpoint:
    """The files of one commit. Raises as `sources.open_source`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # public

    name = parse_hub_source(source)
    info = _ask(name, model, settings)
    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    if info.sha is None or not info.siblings:
        raise ModelNotFound(f"model {model}: {name.repo} has no files at {host}", param="model")
    url = f"{constants.ENDPOINT}/{name.repo}/resolve/{info.sha}"
    objects = _open_http(url, f"{host}/{name.repo}", build_hf_headers(), settings)
    files: dict[str, RawFile] = {}
    for sibling in info.siblings:
        wanted = name.file is None or sibling.rfilename == name.file
        if wanted and "/" not in sibling.rfilename and not sibling.rfilename.startswith("."):
            files[sibling.rfilename] = RemoteFile(
                name=sibling.rfilename,
                path=quote(sibling.rfilename),
                size_bytes=sibling.size or 0,
                etag=None,  # the URL names the commit: its bytes cannot change
                version=info.sha,
                objects=objects,
                fetcher=fetcher,
            )
    if not files:
        raise ModelNotFound(
            f"model {model}: {name.repo} has no file {name.file!r}"
            if name.file
            else f"model {model}: {name.repo} has no files of its own",
            param="model",
        )
    return RawCheckpoint(
        files=files,
        model=model_name(model),
        source=f"hf://{name.repo}",
        revision=info.sha if name.file is None else f"{info.sha}-{name.file}",
        license=_license(info),
    )


def _ask(name: HubName, model: ModelId, settings: IngestSettings) -> ModelInfo:
    """The hub's record of the model."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as said

    transport_error = said.HTTPError  # type: ignore[attr-defined] # of its HTTP library

    try:
        return HfApi().model_info(
            name.repo,
            revision=name.revision,
            files_metadata=True,
            timeout=settings.hub_timeout_s,
        )
    except said.HFValidationError:
        raise InvalidRequest(f"{name.repo!r} is not a hub name", param="source") from None
    except said.OfflineModeIsEnabled:
        raise SourceUnavailable(
            f"model {model}: the hub is switched off by HF_HUB_OFFLINE; unset it"
        ) from None
    except (transport_error, OSError) as error:
        raise _translate(error, name, model) from None
    except ValueError:
        raise SourceUnavailable(
            f"model {model}: the hub's answer is not one of a hub; check HF_ENDPOINT"
        ) from None


def _translate(error: Exception, name: HubName, model: ModelId) -> SLLMError:
    """What a failed question to the hub means. The library's own text holds URLs: not used."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    if isinstance(error, GatedRepoError):
        return SourceDenied(
            f"model {model}: {name.repo} is gated at {host}: ask its owner for access there, "
            "then set HF_TOKEN to your token"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(
            f"model {model}: {name.repo} has no revision {name.revision!r}", param="model"
        )
    if isinstance(error, RepositoryNotFoundError) or _is_absent(error):
        return ModelNotFound(
            f"model {model} is not registered, and {host} has no {name.repo} (or it is private: "
            "then set HF_TOKEN)",
            param="model",
        )
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return _unreachable(host, model)
    status = error.response.status_code
    if status in {401, 403}:
        return SourceDenied(
            f"model {model}: {host} refuses our token ({status}): set HF_TOKEN to a valid one, "
            "or unset it"
        )
    if status == 429:
        return SourceUnavailable(
            f"model {model}: {host} allows no more requests now (429): try again later, or set "
            "HF_TOKEN for a higher limit",
            retry_after_s=_retry_after_s(error.response.headers.get("retry-after")),
        )
    return SourceUnavailable(
        f"model {model}: {host} answers with status {status}: try again later", retry_after_s=5.0
    )


def _is_absent(error: Exception) -> bool:
    """Whether a hub without the usual codes means that there is no such model.

    A hub answers 401 for what does not exist, unless it says that the token itself is wrong.
    """
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return False
    said = error.response.headers.get("x-error-message")
    status = error.response.status_code
    return status == 404 or (status == 401 and said != _BAD_TOKEN)


def _unreachable(host: str, model: ModelId) -> SourceUnavailable:
    return SourceUnavailable(
        f"model {model}: the hub at {host} cannot be reached: check the network, the proxy, or "
        "HF_ENDPOINT",
        retry_after_s=5.0,
    )


def _retry_after_s(text: str | None) -> float:
    seconds = float(text) if text is not None and text.isdigit() else 30.0
    return min(seconds, _RETRY_AFTER_S_MAX)


def _license(info: ModelInfo) -> str | None:
    tags = (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:"))
    return next(tags, None)


def _open_http(url: str, where: str, headers: dict[str, str], settings: IngestSettings) -> Objects:
    bounds = settings.sources
    client: ClientConfig = {
        "allow_http": url.startswith("http://"),
        "connect_timeout": timedelta(seconds=bounds.connect_timeout_s),
        "timeout": timedelta(seconds=bounds.request_timeout_s),
        "default_headers": headers,
    }
    store = HTTPStore(url, client_options=client, retry_config={"max_retries": 0})
    return Objects(store, store, where=where, settings=bounds, clock=SystemClock())
