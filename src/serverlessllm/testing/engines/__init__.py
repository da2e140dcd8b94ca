"""Engines for the tests of template processes: one that does as it is told, and what none should do
when it is imported."""
