"""The generated messages are those of the `.proto` files, and the protocol's where it is public."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from serverlessllm.orchestrator.grpc.proto import open_inference_pb2

ROOT = Path(__file__).parents[3]
PROTOS = ROOT / "src" / "serverlessllm" / "orchestrator" / "grpc" / "proto"
OURS = open_inference_pb2.DESCRIPTOR


def test_what_is_kept_is_what_would_be_generated(tmp_path):
    subprocess.run([ROOT / "scripts" / "protos.sh", tmp_path], check=True)
    for made in tmp_path.iterdir():
        assert (PROTOS / made.name).read_text() == made.read_text(), "run: scripts/protos.sh"
    assert len(list(tmp_path.iterdir())) == 2 * len(list(PROTOS.glob("*.proto")))


def fields(message):
    return {field.name: (field.number, field.type, field.is_repeated) for field in message.fields}


@pytest.mark.parametrize("name", sorted(OURS.message_types_by_name))
def test_a_message_of_the_open_inference_protocol_is_triton_s(name):
    found = [
        module.DESCRIPTOR.message_types_by_name[name]
        for module in (service_pb2, model_config_pb2)
        if name in module.DESCRIPTOR.message_types_by_name
    ]
    pairs = [(OURS.message_types_by_name[name], found[0])]
    while pairs:
        ours, theirs = pairs.pop()
        assert fields(ours).items() <= fields(theirs).items()
        pairs += [
            (nested, theirs.nested_types_by_name[nested.name]) for nested in ours.nested_types
        ]


def test_the_methods_and_types_are_triton_s():
    ours = OURS.services_by_name["GRPCInferenceService"]
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in ours.methods:
        other = theirs[method.name]
        assert (method.client_streaming, method.server_streaming) == (
            other.client_streaming,
            other.server_streaming,
        )
        assert method.input_type.full_name == other.input_type.full_name
        assert method.output_type.full_name == other.output_type.full_name
    known = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"].values_by_name
    mine = OURS.enum_types_by_name["DataType"].values_by_name
    assert {n: v.number for n, v in mine.items()} == {n: v.number for n, v in known.items()}
