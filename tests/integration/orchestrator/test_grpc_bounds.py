"""The gRPC listener itself: who may call, what a client may cost, how it ends."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from serverlessllm.core.ids import Address
from serverlessllm.orchestrator.grpc.health import SERVICE as HEALTH
from serverlessllm.orchestrator.grpc.proto import open_inference_pb2 as triton
from serverlessllm.orchestrator.grpc.proto import serverlessllm_pb2 as pb
from serverlessllm.orchestrator.grpc.proto.pool import POOL
from serverlessllm.testing.rpc import OPENAI, TRITON, Rpc, connected, heard, read, read_all, target
from serverlessllm.testing.waiting import eventually

REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
METHODS = [
    (service, method.name)
    for service in (OPENAI, TRITON, REFLECTION)
    for method in POOL.FindServiceByName(service).methods
]


@pytest.fixture
async def served(cluster):
    """`await served(**settings)` → a cluster that serves gRPC, with a model `m` that is ready."""

    async def start(**settings):
        c = await cluster(**{"grpc_listen": "http://127.0.0.1:0", **settings})
        await c.warm("m")
        return c

    return start


def bearer(key):
    return (("authorization", f"Bearer {key}"),)


async def make_key(c, admin, **fields):
    answer = await c.ask("/api/keys", fields, headers=admin)
    assert answer.status == 201
    key = answer.json()["key"]
    await c.until(lambda: len(c.front.view.api_keys) > 0)
    return bearer(key)


def first_message(service, method):
    """What a method takes, empty."""
    return GetMessageClass(POOL.FindServiceByName(service).methods_by_name[method].input_type)()


def takes_a_stream(service, method):
    return POOL.FindServiceByName(service).methods_by_name[method].client_streaming


def test_the_services_are_those_that_are_tested():
    assert {("serverlessllm.v1.Inference", "WatchModel"), (TRITON, "ModelInfer")} <= {*METHODS}
    assert len(METHODS) == 18


async def test_nothing_but_health_is_served_without_a_key(served):
    c = await served(require_key=True)
    async with connected(c.front.grpc_address) as rpc:
        for service, method in METHODS:
            for metadata in ((), bearer("sk-sllm-wrong")):
                request = first_message(service, method)
                if "model_name" in request.DESCRIPTOR.fields_by_name:
                    request.model_name = "m"
                if "name" in request.DESCRIPTOR.fields_by_name:
                    request.name = "m"
                if method == "WatchModel":
                    request.model = "m"
                if method == "ModelInfer":
                    request.inputs.add(
                        name="text_input",
                        datatype="BYTES",
                        shape=[1],
                        contents=triton.InferTensorContents(bytes_contents=[b"hi"]),
                    )
                opened = (
                    rpc.stream(service, method, metadata=metadata)  # refused before a message
                    if takes_a_stream(service, method)
                    else rpc.open(service, method, [request], metadata=metadata)
                )
                call = await heard(opened, await read_all(opened))
                assert call.messages == []
                assert call.code is grpc.StatusCode.UNAUTHENTICATED, (service, method)
                assert call.trailing["x-sllm-code"] == "invalid_api_key"
        checked = await rpc.call(HEALTH, "Check", HealthCheckRequest())
        assert checked.code is grpc.StatusCode.OK


async def test_a_key_opens_what_its_scopes_and_models_say(served):
    c = await served(require_key=None)
    everything = await make_key(c, (), name="root", scopes=["inference", "admin"])
    some = await make_key(c, everything, name="some", scopes=["inference"], models=["m"])
    operator = await make_key(c, everything, name="operator", scopes=["admin"])
    await c.register("hidden")
    await c.until(lambda: len(c.front.view.api_keys) == 3)
    load = triton.RepositoryModelLoadRequest(model_name="m")
    async with connected(c.front.grpc_address) as rpc:
        listed = await rpc.call(OPENAI, "ListModels", pb.ListModelsRequest(), metadata=some)
        assert [model.id for model in listed.messages[0].models] == ["m"]
        denied = [
            await rpc.call(TRITON, "RepositoryModelLoad", load, metadata=some),
            await rpc.openai("ChatCompletions", {**CHAT, "model": "hidden"}, metadata=some),
            await rpc.call(
                OPENAI, "WatchModel", pb.WatchModelRequest(model="hidden"), metadata=some
            ),
            await rpc.openai("ChatCompletions", CHAT, metadata=operator),
        ]
        assert {call.code for call in denied} == {grpc.StatusCode.PERMISSION_DENIED}
        assert [call.trailing["x-sllm-code"] for call in denied] == [
            "insufficient_scope",
            "model_not_allowed",
            "model_not_allowed",
            "insufficient_scope",
        ]
        good = [
            await rpc.openai("ChatCompletions", CHAT, metadata=some),
            await rpc.call(TRITON, "RepositoryModelLoad", load, metadata=operator),
            await rpc.call(
                TRITON, "ServerMetadata", triton.ServerMetadataRequest(), metadata=operator
            ),
        ]
        assert {call.code for call in good} == {grpc.StatusCode.OK}


async def test_limits_are_those_of_the_key_and_told(served):
    c = await served()
    key = await make_key(c, (), name="few", scopes=["inference", "admin"], requests_per_minute=1)
    async with connected(c.front.grpc_address, key) as rpc:
        first = await rpc.openai("ChatCompletions", CHAT)
        assert first.code is grpc.StatusCode.OK
        assert first.initial["x-ratelimit-remaining-requests"] == "0"
        second = await rpc.openai("ChatCompletions", CHAT)
        assert second.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert second.trailing["x-sllm-code"] == "rate_limit_exceeded"
        assert second.trailing["x-ratelimit-limit-requests"] == "1"
        assert int(second.trailing["retry-after"]) > 0


async def test_health_tells_of_each_service(served):
    c = await served(grpc_health_watchers_max=1)
    async with connected(c.front.grpc_address) as rpc:
        for name in ("", OPENAI, TRITON, REFLECTION):
            checked = await rpc.call(HEALTH, "Check", HealthCheckRequest(service=name))
            assert checked.messages[0].status == SERVING
        unknown = await rpc.call(HEALTH, "Check", HealthCheckRequest(service="nobody"))
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        watch = rpc.open(HEALTH, "Watch", [HealthCheckRequest()])
        assert (await read(watch)).status == SERVING
        refused = await rpc.call(HEALTH, "Watch", HealthCheckRequest())
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        watch.cancel()


async def test_a_generic_client_learns_the_api_by_reflection(served):
    c = await served()

    def ask() -> tuple[set[str], str, bytes]:
        with grpc.insecure_channel(target(c.front.grpc_address)) as channel:
            found = ProtoReflectionDescriptorDatabase(channel)
            services = set(found.get_services())
            pool = DescriptorPool(found)
            method = pool.FindServiceByName(OPENAI).methods_by_name["ChatCompletions"]
            kind, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            call: Any = channel.unary_stream(
                f"/{OPENAI}/{method.name}",
                request_serializer=kind.SerializeToString,
                response_deserializer=answer.FromString,
            )
            (event,) = call(kind(json=json.dumps(CHAT)))
            other = pool.FindServiceByName(TRITON).methods_by_name["ModelStreamInfer"]
            return services, other.input_type.full_name, event.chunk.json

    services, name, answer = await asyncio.to_thread(ask)
    assert services == {OPENAI, TRITON, HEALTH, REFLECTION}
    assert name == "inference.ModelInferRequest"
    assert json.loads(answer)["choices"]


async def test_a_message_over_the_limit_is_refused_unread(served):
    c = await served(grpc_message_bytes_max=100_000)
    bodies = ["x" * 200_000, "x" * 20_000_000]
    async with connected(c.front.grpc_address) as rpc:
        for body in bodies:
            call = await rpc.openai("ChatCompletions", body)
            assert call.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await rpc.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK
    async with connected(c.front.grpc_address, default_compression_algorithm=2) as rpc:
        call = await rpc.openai("ChatCompletions", bodies[1])  # a few KB on the wire
        assert call.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await rpc.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK


async def test_a_message_of_very_many_parts_is_refused_by_its_bytes(served):
    c = await served()
    request = triton.ModelInferRequest(model_name="m", raw_input_contents=[b""] * 2_000_000)
    async with connected(c.front.grpc_address) as rpc:
        call = await rpc.call(TRITON, "ModelInfer", request)
        assert call.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "8192 parts" in call.details
        assert (await rpc.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK


async def test_metadata_over_the_limit_is_refused(served):
    c = await served()
    async with connected(c.front.grpc_address) as rpc:
        call = await rpc.openai("ChatCompletions", CHAT, metadata=(("x-much", "x" * 30_000),))
        assert call.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await rpc.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK


async def test_calls_over_the_limit_are_refused_and_the_others_served(served):
    c = await served(grpc_calls_max=2)
    c.agents[0].token_gate.clear()
    streamed = json.dumps({**CHAT, "stream": True})
    async with connected(c.front.grpc_address) as rpc:
        running = [
            rpc.open(OPENAI, "ChatCompletions", [pb.InferenceRequest(json=streamed)])
            for _ in range(2)
        ]
        for call in running:
            assert (await read(call)).chunk.json
        third = await rpc.openai("ChatCompletions", CHAT)
        assert third.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        c.agents[0].token_gate.set()
        for call in running:
            assert len(await read_all(call)) == 2


async def test_a_client_that_does_not_read_loses_its_place(served):
    c = await served(grpc_calls_max=1, edge={"write_stall_timeout_s": 0.5, "sweep_interval_s": 0.1})
    c.agents[0].tokens = ["x" * 500_000] * 30
    streamed = json.dumps({**CHAT, "stream": True})
    # A window that does not grow by itself.
    async with (
        connected(c.front.grpc_address, (), **{"http2.bdp_probe": 0}) as deaf,
        connected(c.front.grpc_address) as good,
    ):
        unread = deaf.open(OPENAI, "ChatCompletions", [pb.InferenceRequest(json=streamed)])
        await c.until(lambda: c.agents[0].cancelled == 1)

        async def served_again() -> bool:
            return (await good.openai("ListModels", {})).code is grpc.StatusCode.OK

        await eventually(served_again)
        rest = await read_all(unread)
        assert len(rest) < 30
        assert await unread.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stranger_is_told_so_before_a_message_is_sent(served):
    c = await served(require_key=True)
    async with connected(c.front.grpc_address) as rpc:
        for service, method in METHODS:
            call = rpc.stream(service, method, timeout_s=30)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_names_and_ids_without_end_are_refused(served):
    c = await served()
    name = "m" * 1_000_000
    async with connected(c.front.grpc_address) as rpc:
        status = await rpc.call(TRITON, "ModelMetadata", triton.ModelMetadataRequest(name=name))
        assert status.code is grpc.StatusCode.NOT_FOUND
        request = triton.ModelInferRequest(model_name="m", id=name)
        infer = await rpc.call(TRITON, "ModelInfer", request)
        assert infer.code is grpc.StatusCode.INVALID_ARGUMENT
        assert infer.trailing["x-sllm-param"] == "id"


async def test_connections_over_the_limit_are_closed(served):
    c = await served(grpc_connections_max=1)
    async with connected(c.front.grpc_address) as first:
        assert (await first.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK
        async with connected(c.front.grpc_address) as second:
            refused = await second.openai("ChatCompletions", CHAT, timeout_s=5)
            assert refused.code in {
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            }
        assert (await first.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK


async def test_no_message_of_a_stranger_is_a_bug(served):
    """Each method gets bytes that are almost its message: refused, or answered, never a bug."""
    c = await served()
    seeds = [
        pb.InferenceRequest(json=json.dumps(CHAT)),
        pb.WatchModelRequest(model="nobody"),
        triton.RepositoryModelLoadRequest(
            model_name="nobody", parameters={"a": triton.ModelRepositoryParameter()}
        ),
        triton.ModelInferRequest(
            model_name="m",
            id="x",
            inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [1]}],
            raw_input_contents=[b"\x02\x00\x00\x00hi"],
            parameters={"max_tokens": triton.InferParameter(int64_param=5)},
        ),
    ]
    chance = random.Random(7)
    bugs = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    async with connected(c.front.grpc_address) as rpc:
        for service, method in METHODS:
            for seed in seeds:
                data = bytearray(seed.SerializeToString())
                for _ in range(chance.randrange(4)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                del data[chance.randrange(len(data), len(data) + 8) :]
                # Whoever watches the model that there is, or asks reflection, waits for more.
                call = await rpc.call(service, method, bytes(data), timeout_s=20)
                assert call.code not in bugs, (service, method, bytes(data))


async def test_what_is_not_http2_is_closed(served):
    c = await served()
    host, _, port = target(c.front.grpc_address).rpartition(":")
    for junk in (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nXX"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(junk)
        async with asyncio.timeout(30):
            while await reader.read(4096):
                pass
        writer.close()
        await writer.wait_closed()
    async with connected(c.front.grpc_address) as rpc:
        assert (await rpc.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK


async def test_a_drain_tells_health_finishes_streams_and_leaves_nothing(served):
    before = asyncio.all_tasks()
    c = await served()
    c.agents[0].token_gate.clear()
    streamed = json.dumps({**CHAT, "stream": True})
    async with connected(c.front.grpc_address) as rpc:
        health = rpc.open(HEALTH, "Watch", [HealthCheckRequest(service=OPENAI)])
        assert (await read(health)).status == SERVING
        watch = rpc.open(OPENAI, "WatchModel", [pb.WatchModelRequest(model="m")])
        assert (await read(watch)).state == "ready"
        idle = rpc.stream(TRITON, "ModelStreamInfer")
        running = rpc.open(OPENAI, "ChatCompletions", [pb.InferenceRequest(json=streamed)])
        assert (await read(running)).chunk.json
        draining = asyncio.ensure_future(c.front.drain())
        assert (await read(health)).status == NOT_SERVING
        ended = [await heard(call, []) for call in (health, watch, idle)]
        assert {call.code for call in ended} == {grpc.StatusCode.UNAVAILABLE}
        assert {call.trailing["x-sllm-code"] for call in ended} == {"draining"}
        assert not draining.done()
        c.agents[0].token_gate.set()
        assert [event.WhichOneof("event") for event in await read_all(running)] == ["chunk"] * 2
        assert await running.code() is grpc.StatusCode.OK
        await draining
    await c.close()
    await c.until(lambda: asyncio.all_tasks() <= before)


async def test_a_stream_that_outlasts_the_drain_ends_with_an_error(served):
    c = await served(drain_finish_s=0.2)
    c.agents[0].token_gate.clear()
    streamed = json.dumps({**CHAT, "stream": True})
    async with connected(c.front.grpc_address) as rpc:
        running = rpc.open(OPENAI, "ChatCompletions", [pb.InferenceRequest(json=streamed)])
        assert (await read(running)).chunk.json
        await c.front.drain()
        (event,) = await read_all(running)
        ended = await heard(running, [])
        assert ended.code is grpc.StatusCode.UNAVAILABLE
        assert ended.trailing["x-sllm-code"] == event.error.code


async def test_an_address_in_use_and_a_public_one_are_refused(served):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            await served(grpc_listen=f"http://127.0.0.1:{port}")
    with pytest.raises(ValueError, match="other machines"):
        await served(grpc_listen="http://0.0.0.0:0", require_key=False)


async def test_a_unix_socket_serves_too(served, tmp_path):
    c = await served(grpc_listen=f"unix:{tmp_path}/g.sock")
    assert c.front.grpc_address == Address(f"unix:{tmp_path}/g.sock")
    async with connected(c.front.grpc_address) as rpc:
        assert (await rpc.openai("ChatCompletions", CHAT)).code is grpc.StatusCode.OK


async def test_with_a_certificate_it_speaks_tls_and_shows_a_renewed_one(served, tmp_path):
    authority = trustme.CA()
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"

    def renew() -> None:
        cert = authority.issue_cert("localhost", "127.0.0.1")
        chain.write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
        key.write_bytes(cert.private_key_pem.bytes())

    renew()
    c = await served(tls_certificate=str(chain), tls_key=str(key))
    trusted = authority.cert_pem.bytes()

    async def ask() -> grpc.StatusCode:
        credentials = grpc.ssl_channel_credentials(trusted)
        async with grpc.aio.secure_channel(target(c.front.grpc_address), credentials) as channel:
            rpc = Rpc(channel)
            return (await rpc.call(HEALTH, "Check", HealthCheckRequest())).code

    assert await ask() is grpc.StatusCode.OK
    other = trustme.CA()
    authority = other
    renew()
    c.front.reload_certificate()
    trusted = other.cert_pem.bytes()
    assert await ask() is grpc.StatusCode.OK
    chain.write_text("nothing")
    with pytest.raises(ValueError, match="TLS"):
        c.front.reload_certificate()
    async with connected(c.front.grpc_address) as plain:
        refused = await plain.openai("ChatCompletions", CHAT, timeout_s=5)
        assert refused.code is not grpc.StatusCode.OK
