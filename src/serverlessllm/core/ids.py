"""Names and identifiers, and the only parser of model names."""

from __future__ import annotations

import ipaddress
import re
from typing import NewType

from serverlessllm.core.errors import InvalidModelName

ModelId = NewType("ModelId", str)
"""Canonical name of a model: `org/name`, `name`, either with `@revision`."""

CheckpointId = NewType("CheckpointId", str)
"""64 lower-case hex digits: BLAKE3 of the `.idx` bytes."""

AgentId = NewType("AgentId", str)
InstanceId = NewType("InstanceId", str)
RequestId = NewType("RequestId", str)
KeyId = NewType("KeyId", str)
"""Public name of an API key: `key_` and 12 hex digits."""

Epoch = NewType("Epoch", int)
"""Fencing number of an agent's registration or a job's ownership: the higher one wins."""

Address = NewType("Address", str)
"""Where HTTP is spoken: `unix:/path/to.sock` or `http://host:port`."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_MODEL = re.compile(rf"(?P<name>{_PART}(?:/{_PART})?)(?:@(?P<revision>{_PART}))?")
_AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def parse_model_id(text: str) -> ModelId:
    """Check a model name as a client or an operator wrote it.

    Raises:
        InvalidModelName: anything but `[org/]name[@revision]` of letters, digits, `.`, `_`, `-`.
    """
    match = _MODEL.fullmatch(text)
    if match is None or ".." in text:
        raise InvalidModelName(text)
    return ModelId(text)


def model_name(model: ModelId) -> str:
    """The part before `@`."""
    return model.partition("@")[0]


def model_revision(model: ModelId) -> str | None:
    """The part after `@`, if the name pins one."""
    return model.partition("@")[2] or None


def is_hub_name(model: ModelId) -> bool:
    """Whether the name could be a hub's: exactly `org/name[@revision]`."""
    return "/" in model_name(model)


def parse_agent_id(text: str) -> AgentId:
    """Check an agent's name: it becomes part of a key, a path and a metric label."""
    if _AGENT.fullmatch(text) is None:
        raise ValueError(f"agent id {text!r}: use 1-63 letters, digits, '-' or '_'")
    return AgentId(text)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host` (a name or an IP address without a port)."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
