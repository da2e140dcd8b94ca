"""The messages: `*.proto`, and what `scripts/protos.sh` generates of them."""
