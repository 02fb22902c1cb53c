"""Sections of the GPU suite; ``tools/gpu_suite.py`` runs each in a process of its own."""
