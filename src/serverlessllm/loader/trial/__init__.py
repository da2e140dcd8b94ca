"""What one load is worth on this machine: the loader beside the machine's own limit, in one run.

Everything happens in private directories that are removed at the end; nothing that serves is
touched. `measure` is the door.
"""
