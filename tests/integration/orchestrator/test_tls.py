"""https through the whole front door, and the verbs' client on the other end."""

from __future__ import annotations

import asyncio

import pytest
import trustme

from serverlessllm.cli.client import Client
from serverlessllm.cli.failure import Failure
from serverlessllm.core.apikeys import NewApiKey, Scope
from serverlessllm.core.ids import Address
from serverlessllm.orchestrator.rest import wire


class Files:
    """A certificate for this machine, its key, and the authority that others trust."""

    def __init__(self, folder):
        self.folder = folder
        self.certificate, self.key = str(folder / "chain.pem"), str(folder / "key.pem")
        self.renew()

    def renew(self):
        authority = trustme.CA()
        cert = authority.issue_cert("127.0.0.1")
        self.ca = str(self.folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        cert.private_key_and_cert_chain_pem.write_to_path(self.certificate)
        cert.private_key_pem.write_to_path(self.key)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


async def started(c, files, **fields):
    front = c.another({"tls_certificate": files.certificate, "tls_key": files.key, **fields})
    address = await front.start(Address("http://127.0.0.1:0"))
    return front, address.replace("http://", "https://")


async def test_the_verbs_talk_https_with_a_key(cluster, files):
    c = await cluster(agents=0)
    key, text = await c.registry.create_api_key(NewApiKey(name="boss", scopes=(Scope.ADMIN,)))
    front, url = await started(c, files)
    try:
        await c.until(lambda: key.sha256 in front.view.api_keys)
        client = Client(url, text, files.ca)
        listed = await asyncio.to_thread(client.get, "/api/keys", wire.KeyList)
        assert [found.name for found in listed.keys] == ["boss"]
        with pytest.raises(Failure, match="no API key"):
            await asyncio.to_thread(Client(url, None, files.ca).get, "/api/keys", dict)
        with pytest.raises(Failure, match="not trusted") as untrusted:
            await asyncio.to_thread(Client(url, text).get, "/api/keys", dict)
        assert "--ca" in untrusted.value.cure
        plain = Client(url.replace("https", "http"), text)
        with pytest.raises(Failure) as cut:
            await asyncio.to_thread(plain.get, "/api/keys", dict)
        assert "https" in cut.value.cure
        elsewhere = Client(url.replace("127.0.0.1", "localhost"), text, files.ca)
        with pytest.raises(Failure, match="not valid for 'localhost'") as misnamed:
            await asyncio.to_thread(elsewhere.get, "/api/keys", dict)
        assert "a name in its certificate" in misnamed.value.cure
    finally:
        await front.close()


async def test_a_renewed_certificate_is_shown_when_it_is_good(cluster, files):
    c = await cluster(agents=0)
    front, url = await started(c, files)
    try:
        files.renew()
        with pytest.raises(Failure, match="not trusted"):
            await asyncio.to_thread(Client(url, None, files.ca).get, "/api/version", wire.Version)
        front.reload_certificate()
        await asyncio.to_thread(Client(url, None, files.ca).get, "/api/version", wire.Version)
        (files.folder / "key.pem").write_text("broken")
        with pytest.raises(ValueError, match="TLS"):
            front.reload_certificate()
        await asyncio.to_thread(Client(url, None, files.ca).get, "/api/version", wire.Version)
    finally:
        await front.close()


async def test_a_certificate_that_is_not_there_keeps_it_from_starting(cluster, files):
    c = await cluster(agents=0)
    for fields in ({"tls_certificate": "/none.pem"}, {"tls_key": "/none.pem"}):
        with pytest.raises(ValueError, match=r"/none\.pem cannot be read"):
            await started(c, files, **fields)


def test_a_file_of_no_certificates_is_named(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        with pytest.raises(Failure, match="no certificates"):
            Client("https://127.0.0.1:1", None, str(path))


def test_a_unix_socket_is_nothing_that_verbs_ask():
    with pytest.raises(Failure, match="not through a unix socket"):
        Client("unix:/run/x.sock")
