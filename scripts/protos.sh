#!/usr/bin/env bash
# Generate the Python of the gRPC messages: scripts/protos.sh [folder to write to]. It goes into a
# descriptor pool of our own (pool.py says why).
set -euo pipefail
cd "$(dirname "$0")/.."

SOURCE=src/serverlessllm/orchestrator/grpc/proto
OUT=${1:-$SOURCE}
DEFAULT='from google.protobuf import descriptor_pool as _descriptor_pool'
OURS='from serverlessllm.orchestrator.grpc.proto import pool as _pool'

.venv/bin/python -m grpc_tools.protoc --proto_path="$SOURCE" --python_out="$OUT" --pyi_out="$OUT" \
    "$SOURCE"/*.proto
sed -i -e "s/^$DEFAULT\$/$OURS/" -e 's/_descriptor_pool\.Default()/_pool.POOL/' "$OUT"/*_pb2.py
