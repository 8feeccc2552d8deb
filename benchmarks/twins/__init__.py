"""Our networks in PyTorch: modules of other libraries that compute the same function with the same weights."""
