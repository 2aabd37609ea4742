"""Workloads and the measuring protocol that every benchmark of the project shares."""
