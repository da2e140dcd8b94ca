"""What an engine answered, as the API says it must be: pure, bytes in and bytes out.

`read_asked` reads what a client wants of an answer's form, `engine_body` puts the request so that
the engine says enough, `complete` makes a whole answer spec-complete, `StreamedAnswer` one that
comes in pieces. What engines omit is filled in, what they invent is dropped, unless it is on the
list of what is kept: `reasoning_content`, and vLLM's `stop_reason`, `token_ids`,
`prompt_token_ids`, `prompt_logprobs`.
"""

from serverlessllm.openai.answers.asked import KINDS, Asked, Kind, engine_body, read_asked
from serverlessllm.openai.answers.failures import not_streamed
from serverlessllm.openai.answers.identity import Stamp
from serverlessllm.openai.answers.stream import StreamedAnswer
from serverlessllm.openai.answers.usage import Usage
from serverlessllm.openai.answers.whole import Complete, complete

__all__ = [
    "KINDS",
    "Asked",
    "Complete",
    "Kind",
    "Stamp",
    "StreamedAnswer",
    "Usage",
    "complete",
    "engine_body",
    "not_streamed",
    "read_asked",
]
