"""The tiny GGUF is a real model: llama.cpp maps a converted one and chats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_file
from serverlessllm.testing.checkpoints import WORDS, write_random_gguf

# The engine logs to both streams of its process and ends it when it dislikes a file.
_CHAT = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 512
params.warmup = False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
body = json.dumps({
    "messages": [{"role": "user", "content": "What is 2+2? ☃"}], "max_tokens": 8, "seed": 1,
}).encode()
request = urllib.request.Request(
    server.listening_address + "/v1/chat/completions", body, {"content-type": "application/json"})
with urllib.request.urlopen(request) as answer, open(sys.argv[2], "wb") as file:
    file.write(answer.read())
"""


def test_llama_cpp_chats_from_a_converted_bin(tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "m.gguf")
    assert source.stat().st_size < 600_000
    done = convert(open_file(source, model="m"), tmp_path / "out")
    answer_path = tmp_path / "answer"
    command = [sys.executable, "-c", _CHAT, str(done.bin_path), str(answer_path)]
    ended = subprocess.run(command, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr[-2000:]
    answer = json.loads(answer_path.read_bytes())
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"
    words = answer["choices"][0]["message"]["content"].split()
    assert len(words) == 8
    assert set(words) <= set(WORDS)
