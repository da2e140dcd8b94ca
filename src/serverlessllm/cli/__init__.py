"""The `sllm` command: one file a verb; a verb imports what it needs when it runs."""
