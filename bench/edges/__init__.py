"""The parts of bench/edge.py: the routers it compares, the load, the figures."""
