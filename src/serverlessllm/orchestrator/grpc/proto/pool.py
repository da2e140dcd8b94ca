"""A descriptor pool of our own.

The process-wide pool takes each name once. Triton's client, and any generated KServe client, brings
`inference.ModelInferRequest` too; whoever imports both must not fail.
"""

from __future__ import annotations

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
