"""Continuous batching: the library's scheduler, paged cache and loop, with our sampling inside.

The library chooses tokens for all requests alike, so the step that samples is replaced by one that
knows each request (`sampling.py`). Its loop runs in a thread of its own; all else here belongs to
the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import msgspec
import torch
from torch.overrides import TorchFunctionMode
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
    ProtoPretrainedModel,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import GenerationOutput

from serverlessllm.backends.inside.transformers.constraints import Constraint
from serverlessllm.backends.inside.transformers.sampling import Sampler, Sampling, Score, choose
from serverlessllm.core.errors import LoadFailed, SLLMError, Unavailable

_T = TypeVar("_T")
WAITING_MAX = 1024
"""Answers in the making or waiting; more are refused. The agent sends far fewer."""


class BatchLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the cache and of a step, in tokens and requests."""

    context: int
    page: int
    batch: int
    slots: int


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What has come of one answer since the last one."""

    tokens: list[int]
    scores: list[Score]
    """As many as tokens where they were asked for, else none."""
    finished: bool
    error: SLLMError | None = None


class Generation:
    """One answer in the making."""

    def __init__(self, name: str, sampler: Sampler, take: Callable[[Update], None]) -> None:
        self.name = name
        self.sampler = sampler
        self.cached_tokens = 0
        """Of its prompt: found in the cache."""
        self._take = take
        self._seen = 0

    def deliver(self, output: GenerationOutput) -> None:
        """Pass on what is new."""
        tokens = output.generated_tokens[self._seen :]
        scores = self.sampler.scores[self._seen : self._seen + len(tokens)]
        self._seen += len(tokens)
        failed = output.error is not None
        self._take(
            Update(
                tokens=tokens,
                scores=scores,
                finished=output.is_finished(),
                error=SLLMError("the engine failed; its log says why") if failed else None,
            )
        )


class Generator:
    """The engine's loop, and who waits for what of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        limits: BatchLimits,
        on_failure: Callable[[], None],
    ) -> None:
        """Prepares; nothing is computed. `on_failure` is called when the loop has ended.

        Raises:
            LoadFailed: the library cannot batch this kind of model.
        """
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, Generation] = {}
        self._names = itertools.count(1)
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._manager = _manager(model, limits)
        self._manager.live = self._live
        self._manager.on_failure = lambda: self._loop.call_soon_threadsafe(on_failure)
        self._manager.output_router = _Router(self._loop, self._deliver)

    def start(self) -> None:
        """Let the loop begin: it makes its cache, then waits for requests."""
        self._manager.start()

    def close(self) -> None:
        """End the loop, after the step it is at; what it was at is not finished."""
        self._manager.stop(block=True, hard_stop=True)

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        tokens_max: int,
        eos: frozenset[int],
        take: Callable[[Update], None],
        constraint: Constraint | None = None,
    ) -> Generation:
        """Queue an answer; `take` is called in this event loop until it is finished.

        Raises:
            Unavailable: too many wait already, or the loop has ended.
        """
        if len(self._live) >= WAITING_MAX:
            raise Unavailable("the model's engine has too many requests waiting; try again")
        name = str(next(self._names))
        generation = Generation(name, Sampler(sampling, prompt, constraint), take)
        self._live[name] = generation
        self._prompt_tokens += len(prompt)
        accepted = self._manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=tokens_max,
            streaming=True,
            eos_token_id=sorted(eos),
        )
        if accepted is None:
            del self._live[name]
            raise Unavailable("the model's engine is stopping; try again")
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop before the next step, if it is not finished; it delivers nothing more."""
        if self._forget(generation):
            self._manager.cancel_request(generation.name)

    def run_aside(self, compute: Callable[[], _T]) -> _T:
        """Compute between two steps; blocks, so call it in a thread."""
        with self._manager.pause(), torch.inference_mode():
            return compute()

    @property
    def running(self) -> int:
        """Answers in the batch."""
        processor = self._manager.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    @property
    def queued(self) -> int:
        """Answers that wait for a place."""
        processor = self._manager.batch_processor
        waiting = 0 if processor is None else len(processor.scheduler.waiting_requests)
        return waiting + int(self._manager.input_queue.qsize())

    @property
    def steps(self) -> int:
        """Forward passes so far."""
        return self._manager.steps

    @property
    def kv_hit_rate(self) -> float:
        """Share of all prompt tokens so far that came from the cache, 0..1."""
        live = sum(generation.cached_tokens for generation in self._live.values())
        cached = self._cached_tokens + live
        return cached / self._prompt_tokens if self._prompt_tokens else 0.0

    def _deliver(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            generation = self._live.get(output.request_id)
            if generation is not None:
                if output.is_finished():
                    self._forget(generation)
                generation.deliver(output)

    def _forget(self, generation: Generation) -> bool:
        if self._live.pop(generation.name, None) is None:
            return False
        self._cached_tokens += generation.cached_tokens
        return True


class _Router(OutputRouter):
    """Brings outputs to the event loop, a step's in one call."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[list[GenerationOutput]], None],
    ) -> None:
        super().__init__()
        self._loop = loop
        self._take = take

    def deliver(self, output: GenerationOutput) -> None:
        self._loop.call_soon_threadsafe(self._take, [output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._loop.call_soon_threadsafe(self._take, outputs)


class _Manager(ContinuousBatchingManager):
    """The library's, with our runner in its processor."""

    live: dict[str, Generation]
    on_failure: Callable[[], object]
    runner: _Runner | None = None

    @property
    def steps(self) -> int:
        return 0 if self.runner is None else self.runner.steps

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        with _KernelZeros():
            processor = super()._create_batch_processor()
        self.runner = _Runner(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            cache=processor.cache,
            inputs_and_outputs=processor.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )
        self.runner.live = self.live
        processor.model_runner = self.runner
        self._count_hits(processor)
        return processor

    def _count_hits(self, processor: ContinuousBatchProcessor) -> None:
        search = processor.cache.search_prefix_match

        def counted(request_id: str, prompt_ids: list[int]) -> int:
            found: int = search(request_id, prompt_ids)
            generation = self.live.get(request_id)
            if generation is not None:
                generation.cached_tokens = found
            return found

        processor.cache.search_prefix_match = counted  # type: ignore[method-assign] # its one seam

    def _handle_critical_error(
        self, error: Exception, batch_processor: ContinuousBatchProcessor | None
    ) -> None:
        super()._handle_critical_error(error, batch_processor)
        self.on_failure()


def _manager(model: PreTrainedModel, limits: BatchLimits) -> _Manager:
    if getattr(model, "_is_stateful", False):  # the library would find out at the first request
        raise LoadFailed(f"transformers cannot batch {type(model).__name__}: it keeps a state")
    try:
        return _Manager(
            model=cast(ProtoPretrainedModel, model),
            generation_config=GenerationConfig(do_sample=False),  # type: ignore[no-untyped-call]
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=limits.page,
                num_blocks=math.ceil(limits.context / limits.page),
                max_batch_tokens=limits.batch,
                max_requests_per_batch=limits.slots,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
    except (ValueError, AttributeError) as error:
        raise LoadFailed(f"transformers cannot batch {type(model).__name__}: {error}") from error


class _KernelZeros(TorchFunctionMode):
    """Zeros as the kernel gives them: memory is taken when a page is first written to. The
    library's own cache would be written to, all of it, before the first token."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if (
            func is torch.zeros
            and isinstance(args[0], int)
            and args[0] > 0
            and given.get("dtype") is torch.uint8
            and torch.device(given.get("device", "cpu")).type == "cpu"
        ):
            pages = mmap.mmap(-1, args[0], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(pages, dtype=torch.uint8)
        return func(*args, **given)


class _Runner(ModelRunner):
    """Chooses each request's token by its own rules."""

    live: dict[str, Generation]
    steps = 0
    _idle = Sampler(Sampling(temperature=0), ())

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        samplers = []
        batch = cast(ContinuousBatchingIOs, self.inputs_and_outputs)  # we never run two at once
        for future in batch.requests_in_batch:
            if future.has_new_token:
                generation = self.live.get(future.state.request_id)  # None: cancelled just now
                samplers.append(self._idle if generation is None else generation.sampler)
        if samplers:
            output_ids[0, : len(samplers)].copy_(choose(scores[0], samplers))
        self.steps += 1
