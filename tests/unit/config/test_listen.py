"""Listening where others can connect needs a yes."""

from __future__ import annotations

import pytest

from serverlessllm.config.listen import parse_listen


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.9.9.9:1", "http://127.9.9.9:1"),
        ("localhost:0", "http://localhost:0"),
        ("[::1]:80", "http://[::1]:80"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
    ],
)
def test_loopback_needs_no_flag(text, address):
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"])
def test_others_need_the_flag(text):
    with pytest.raises(ValueError, match="--allow-remote"):
        parse_listen(text)
    assert parse_listen(text, allow_remote=True) == f"http://{text}"


@pytest.mark.parametrize("text", ["", "8000", ":8000", "host", "h:x", "h:65536", "h:-1", "unix:x"])
def test_nonsense_says_how_to_write_it(text):
    with pytest.raises(ValueError, match="write host:port"):
        parse_listen(text, allow_remote=True)
