"""The checkpoint store: immutable checkpoints in an object store, one door for every URL."""
