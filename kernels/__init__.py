"""Kernels, one file per operator, under the name and the contract of its torch original.

Triton for GPUs, and on CPU tensors where the process was started with TRITON_INTERPRET=1; ``cpu``
for instruction sets of CPUs. A kernel lives here only while something calls it and it is measured
faster than what it replaces, or nothing could measure it.
"""
