"""From plan to tokens: input tensors, the step, sampling, weights."""
