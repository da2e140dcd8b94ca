"""What the cluster agrees on: models, agents, jobs, in one small key-value store.

`base` is the seam, `open` picks an adapter by URL, `registry` gives it types.
"""
