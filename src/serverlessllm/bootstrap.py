"""Settings → objects: the only place that picks adapters."""
