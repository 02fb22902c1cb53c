"""The paged KV cache: which pages a request holds, where a position lives, the tensors."""
