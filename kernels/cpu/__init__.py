"""C++ kernels by instruction set, one file per operator, beside its Python door."""
