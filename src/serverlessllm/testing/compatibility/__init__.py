"""Which parameters do what on which backend, found out by asking real engines.

`python -m serverlessllm.testing.compatibility` writes `docs/compatibility.md`;
`tests/contract/test_compatibility.py` holds the page to what it finds.
"""
