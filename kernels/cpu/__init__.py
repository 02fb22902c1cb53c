"""C++ kernels for processors with AVX-512 BF16, one file per operator, beside its Python door."""
