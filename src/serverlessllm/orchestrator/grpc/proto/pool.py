"""A descriptor pool of our own: every message that this server speaks.

The process-wide pool takes each name once. Triton's client, and any generated KServe client, brings
`inference.ModelInferRequest` too; whoever imports both must not fail.
"""

from __future__ import annotations

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

POOL = DescriptorPool()

for _file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
    POOL.AddSerializedFile(_file.serialized_pb)
