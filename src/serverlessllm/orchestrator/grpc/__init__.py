"""The gRPC listener: our own service, the Open Inference Protocol, health and reflection.

Nothing here decides anything about a request: each becomes one of the HTTP API's at this process's
own front door (`rest/front.py`), so that key, limits, cold start and errors are the same.

| module | what it does |
|---|---|
| `server.py` | listens, drains, closes |
| `calls.py` | one call: its metadata, messages, deadlines, and how it ends |
| `wire.py` | how many parts a message has, before any is made |
| `asking.py` | asks the front door on a call's behalf, and reads what it says |
| `statuses.py` | an error as status, trailing metadata and JSON |
| `openai.py` | `serverlessllm.v1.Inference` |
| `watching.py` | the status of a model, as it changes |
| `triton.py`, `repository.py` | `inference.GRPCInferenceService` |
| `tensors.py`, `texts.py` | its tensors, and what they mean for a language model |
| `health.py` | `grpc.health.v1.Health` |
"""

import os

# This process starts others by exec only, which needs none of what gRPC does around a fork; left
# on, it prints a line at each one. It is read when `grpc` is imported, after this.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
