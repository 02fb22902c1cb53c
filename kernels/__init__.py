"""Kernels, one file per operator, under the name and the contract of its torch original.

Triton for GPUs, not measured yet, and on CPU tensors where the process was started with
TRITON_INTERPRET=1; ``cpu`` for processors with AVX-512 BF16. A kernel lives here only while it is
measured faster than what it replaces, or nothing could measure it.
"""
