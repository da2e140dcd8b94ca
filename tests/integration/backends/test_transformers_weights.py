"""Weights that stay where they are: the same logits as the library's own loading, and no copy."""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from serverlessllm.backends.base import ALL_ARRIVED
from serverlessllm.backends.inside.transformers.arrivals import Arrivals
from serverlessllm.backends.inside.transformers.gates import Gates
from serverlessllm.backends.inside.transformers.mapping import Mapping
from serverlessllm.backends.inside.transformers.text import Message, Text
from serverlessllm.backends.inside.transformers.weights import Weights, read_config
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import Index, layers
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.errors import LoadFailed
from serverlessllm.testing.hf import smollm2_folder
from serverlessllm.testing.waiting import eventually_blocking

PROMPT = torch.tensor([[5, 9, 3, 200, 41, 7, 7, 250]])
CHUNK_BYTES = 4096
DECODER: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**DECODER, dtype="bfloat16"),
    "llama, head tied": LlamaConfig(**DECODER, tie_word_embeddings=True, dtype="float32"),
    "qwen3, head tied": Qwen3Config(**DECODER, tie_word_embeddings=True, dtype="bfloat16"),
    "gpt2": GPT2Config(vocab_size=256, n_embd=64, n_layer=3, n_head=4, dtype="float32"),
    "mixtral": MixtralConfig(**DECODER, num_local_experts=4, dtype="bfloat16"),
}


class Made(msgspec.Struct, frozen=True):
    """A checkpoint, and what it was made of."""

    folder: Path
    index: Index
    bin_path: Path

    def mapping(self) -> Mapping:
        return Mapping(self.index, os.open(self.bin_path, os.O_RDONLY))

    def original(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto")
        assert isinstance(model, PreTrainedModel)
        return model


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    made: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made:
            folder = tmp_path_factory.mktemp("hf")
            torch.manual_seed(7)
            config = CONFIGS[name]
            AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)
            out = tmp_path_factory.mktemp("checkpoint")
            converted = convert(open_folder(folder, model="m"), out, chunk_bytes=CHUNK_BYTES)
            made[name] = Made(folder, converted.index, converted.bin_path)
        return made[name]

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=PROMPT, use_cache=False).logits
    return found


class Arriving:
    """A checkpoint that fills a file while an engine reads it."""

    def __init__(self, made: Made, folder: Path) -> None:
        self.made = made
        self._source = made.bin_path.read_bytes()
        self._path = folder / "arriving.bin"
        self._path.write_bytes(bytes(len(self._source)))
        self.failed = threading.Event()
        read_end, self._pipe = os.pipe()
        self.arrivals = Arrivals(made.index, read_end, self.failed.set)

    def mapping(self) -> Mapping:
        return Mapping(self.made.index, os.open(self._path, os.O_RDONLY))

    def bring(self, *numbers: int) -> None:
        """Write these chunks' bytes, then tell."""
        with self._path.open("r+b") as file:
            for number in numbers:
                offset, size = self.made.index.chunk_range(number)
                file.seek(offset)
                file.write(self._source[offset : offset + size])
        os.write(self._pipe, struct.pack(f"<{len(numbers)}I", *numbers))

    def bring_side_files(self) -> list[int]:
        """Returns what is left to bring."""
        files = self.made.index.side_files
        first = {n for file in files for n in self.arrivals.chunks(file.offset, file.size_bytes)}
        self.bring(*sorted(first))
        return [n for n in range(len(self.made.index.chunks)) if n not in first]

    def end(self, *, whole: bool) -> None:
        if whole:
            os.write(self._pipe, struct.pack("<I", ALL_ARRIVED))
        os.close(self._pipe)


class InThread:
    """A call that may block."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None

        def run() -> None:
            self.result = call()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> object:
        self._thread.join(30)
        assert self.done
        return self.result


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_the_library_bit_for_bit(
    make: Callable[[str], Made], name: str
) -> None:
    made = make(name)
    model = Weights(made.index, made.mapping(), None, "cpu").model
    assert not model.training
    assert torch.equal(logits(model), logits(made.original()))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mixtral"])
def test_every_parameter_is_a_view_of_the_checkpoint(
    make: Callable[[str], Made], name: str
) -> None:
    made = make(name)
    mapping = made.mapping()
    model = Weights(made.index, mapping, None, "cpu").model
    assert all(mapping.span(parameter) for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_running_it_makes_no_private_page_of_the_weights(make: Callable[[str], Made]) -> None:
    made = make("llama")
    weights = Weights(made.index, made.mapping(), None, "cpu")
    logits(weights.model)
    found = re.findall(
        rf"{re.escape(str(made.bin_path))}\n(?:.*\n)*?Rss:\s+(\d+) kB\n(?:.*\n)*?"
        r"Private_Dirty:\s+(\d+) kB\n(?:.*\n)*?Anonymous:\s+(\d+) kB",
        Path("/proc/self/smaps").read_text(),
    )
    assert found
    for rss, private_dirty, anonymous in found:
        assert int(rss) > 0
        assert (private_dirty, anonymous) == ("0", "0")


def test_a_layer_computes_before_the_next_has_arrived(
    make: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arriving = Arriving(make("llama"), tmp_path)
    left = arriving.bring_side_files()
    weights = Weights(arriving.made.index, arriving.mapping(), arriving.arrivals, "cpu")
    running = InThread(lambda: logits(weights.model))
    for layer in layers(arriving.made.index):
        assert not _has_computed(weights, layer.name)
        chunks = set(arriving.arrivals.chunks(layer.offset, layer.size_bytes)) & set(left)
        arriving.bring(*sorted(chunks))
        left = [number for number in left if number not in chunks]
        if layer.name.startswith("model.layers"):
            eventually_blocking(partial(_has_computed, weights, layer.name))
    arriving.bring(*left)
    arriving.end(whole=True)
    assert torch.equal(running.join(), logits(arriving.made.original()))  # type: ignore[arg-type] # a tensor
    last = max(weights.arrived_s.values())
    assert weights.waits[1].layer == "model.layers.0"
    assert weights.waits[1].computed_at_s < last
    told = re.findall(r"the first pass began with (\d+) chunks to come", capsys.readouterr().err)
    assert len(told) == 1
    assert 0 < int(told[0]) < len(arriving.made.index.chunks)
    waited = len(weights.waits)
    logits(weights.model)
    assert len(weights.waits) == waited, "the gates are gone after the first pass"


def _has_computed(weights: Weights, layer: str) -> bool:
    return layer in {wait.layer for wait in weights.waits}


def test_what_must_be_copied_waits_for_all_of_it(
    make: Callable[[str], Made], tmp_path: Path
) -> None:
    arriving = Arriving(make("mixtral"), tmp_path)
    left = arriving.bring_side_files()
    loading = InThread(
        lambda: Weights(arriving.made.index, arriving.mapping(), arriving.arrivals, "cpu")
    )
    arriving.bring(*left)
    assert not loading.done
    arriving.end(whole=True)
    weights = loading.join()
    assert isinstance(weights, Weights)
    assert torch.equal(logits(weights.model), logits(arriving.made.original()))


def test_the_end_of_the_arrivals_before_all_is_here_is_a_failure(
    make: Callable[[str], Made], tmp_path: Path
) -> None:
    arriving = Arriving(make("llama"), tmp_path)
    arriving.bring_side_files()
    arriving.end(whole=False)
    assert arriving.failed.wait(60)
    assert not arriving.arrivals.complete


class PastItsCall(torch.nn.Module):
    """Uses a part's weight without calling the part: no hook of the part's ever runs."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.part = torch.nn.Linear(1, 1, bias=False, device="meta")
        self.part.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.part.weight.sum()


def test_a_weight_that_is_used_past_its_modules_call_is_waited_for(
    make: Callable[[str], Made], tmp_path: Path
) -> None:
    arriving = Arriving(make("llama"), tmp_path)
    left = arriving.bring_side_files()
    mapping = arriving.mapping()
    weight = mapping.tensors()["model.embed_tokens.weight"]
    model = PastItsCall(weight)
    Gates(model, mapping, arriving.arrivals)
    running = InThread(model)
    arriving.bring(*left)
    arriving.end(whole=True)
    expected = arriving.made.mapping().tensors()["model.embed_tokens.weight"].sum()
    found = running.join()
    assert isinstance(found, torch.Tensor)
    assert found == expected != 0


def _without(index: Index, name: str) -> Index:
    kept = tuple(tensor for tensor in index.tensors if tensor.name != name)
    return msgspec.structs.replace(index, tensors=kept)


def test_a_checkpoint_that_lacks_weights_is_refused(make: Callable[[str], Made]) -> None:
    made = make("llama")
    index = _without(made.index, "model.norm.weight")
    mapping = Mapping(index, os.open(made.bin_path, os.O_RDONLY))
    with pytest.raises(LoadFailed, match=r"lacks 1 weights: model\.norm\.weight"):
        Weights(index, mapping, None, "cpu")


def test_weights_of_another_shape_are_refused(make: Callable[[str], Made]) -> None:
    made = make("llama")
    turned = tuple(
        msgspec.structs.replace(tensor, shape=tensor.shape[::-1]) for tensor in made.index.tensors
    )
    index = msgspec.structs.replace(made.index, tensors=turned)
    mapping = Mapping(index, os.open(made.bin_path, os.O_RDONLY))
    with pytest.raises(LoadFailed, match="cannot build LlamaForCausalLM"):
        Weights(index, mapping, None, "cpu")


def test_an_architecture_that_the_library_lacks_is_refused(make: Callable[[str], Made]) -> None:
    made = make("llama")
    index = msgspec.structs.replace(made.index, architecture="NoneForCausalLM")
    with pytest.raises(LoadFailed, match="has no 'NoneForCausalLM'"):
        Weights(index, made.mapping(), None, "cpu")


@pytest.mark.parametrize(
    "config",
    [b"[]", b'{"model_type": "none"}', b'{"model_type": "llama", "hidden_size": "wide"}'],
    ids=["no object", "an unknown type", "a text for a number"],
)
def test_a_configuration_that_is_not_valid_is_refused(
    make: Callable[[str], Made], config: bytes
) -> None:
    with pytest.raises(LoadFailed, match=r"config\.json"):
        read_config(make("llama").index, {"config.json": config})


def test_the_demo_model_answers_by_its_own_tokenizer_and_template(tmp_path: Path) -> None:
    folder = smollm2_folder(tmp_path)
    converted = convert(open_folder(folder, model="smollm2"), tmp_path)
    mapping = Made(folder, converted.index, converted.bin_path).mapping()
    model = Weights(converted.index, mapping, None, "cpu").model
    text = Text(mapping.side_files(), tmp_path)
    question = [Message(role="user", content="What is 2+2?")]
    prompt = text.encode_chat(question, generation_prompt=True, continue_last=False)
    with torch.inference_mode():
        answered = cast(Any, model).generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False
        )
    assert "4" in text.decode(answered[0, len(prompt) :].tolist())
