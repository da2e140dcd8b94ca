"""Quantising weights on their way into a checkpoint, and running them: the arithmetic is torch's,
the format and the rounding are `compressed-tensors`'. Only `messages` is imported outside."""
