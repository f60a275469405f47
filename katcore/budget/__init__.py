"""What a training needs before it runs: parameters, memory of each GPU, tokens, seconds. Arithmetic alone."""
