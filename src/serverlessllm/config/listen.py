"""Which addresses a server may listen on."""

from __future__ import annotations

from serverlessllm.core.ids import Address, is_loopback

_PORT_MAX = 65535


def parse_listen(text: str, *, allow_remote: bool = False) -> Address:
    """`host:port`, `[::1]:port`, `http://host:port` or `unix:/path` → an address to listen on.

    Raises:
        ValueError: not an address; or other machines reach it and `allow_remote` is off.
    """
    if text.startswith("unix:/"):
        return Address(text)
    host, separator, port = (
        text.removeprefix("http://").removeprefix("https://").rstrip("/").rpartition(":")
    )
    bare = host.removeprefix("[").removesuffix("]")
    if not separator or not bare or not port.isdecimal() or int(port) > _PORT_MAX:
        raise ValueError(
            f"listen address {text!r}: write host:port, such as 127.0.0.1:8000, or unix:/path"
        )
    if not is_loopback(bare) and not allow_remote:
        raise ValueError(
            f"listen address {text!r}: other machines could reach it, and no API key is asked "
            "for. Listen on 127.0.0.1, make a key (`sllm key create`), or accept that everybody "
            "there may use and change everything: --allow-remote"
        )
    return Address(f"http://{f'[{bare}]' if ':' in bare else bare}:{int(port)}")
