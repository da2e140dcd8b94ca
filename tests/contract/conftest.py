"""The suites live in the package, so that plugin authors have them: their asserts explain too."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("serverlessllm.testing.contracts")
