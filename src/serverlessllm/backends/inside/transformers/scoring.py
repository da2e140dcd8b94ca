"""What a model makes of a given text: the log probability of each of its tokens, its embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from serverlessllm.backends.inside.transformers.sampling import Score, score

_LOGITS_BYTES_MAX = 64 << 20
"""Of the logits that are there at the same time."""


def prompt_scores(
    model: PreTrainedModel, tokens: Sequence[int], alternatives: int
) -> list[Score | None]:
    """Each token's score after those before it; of the first there is none. Call it within
    `Generator.run_aside`.

    The whole vocabulary's logits of a long text would be gigabytes, so the pass is repeated for
    as many places as fit.
    """
    ids = torch.tensor([list(tokens)], device=model.device)
    vocabulary = int(model.config.get_text_config().vocab_size)
    step = max(1, _LOGITS_BYTES_MAX // (4 * vocabulary))
    scores: list[Score | None] = [None]
    for start in range(0, len(tokens) - 1, step):
        places = torch.arange(start, min(start + step, len(tokens) - 1), device=model.device)
        rows = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0].float().cpu()
        following = tokens[start + 1 : start + 1 + len(places)]
        scores += [
            score(row, token, alternatives) for row, token in zip(rows, following, strict=True)
        ]
    return scores


def embedding(model: PreTrainedModel, tokens: Sequence[int], width: int | None) -> torch.Tensor:
    """Of length 1: the mean of the last hidden states, or its first `width` numbers. Call it
    within `Generator.run_aside`."""
    ids = torch.tensor([list(tokens)], device=model.device)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return torch.nn.functional.normalize(states.float().mean(0)[:width], dim=0)
