"""Ingestion: raw weights from a source become a published checkpoint, once in the cluster."""
