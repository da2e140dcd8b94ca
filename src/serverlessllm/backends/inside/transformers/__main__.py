"""One process for both: for when there is no template."""

from __future__ import annotations

import sys

from serverlessllm.backends.inside.transformers import main, preload

preload()
main(sys.argv[1])
