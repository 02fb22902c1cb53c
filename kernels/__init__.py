"""Triton kernels, one file per operator, under the name and the contract of its torch original.

A kernel lives here only while it is measured faster than what it replaces.
"""
