"""Training's fast path on a CPU: a network's graph, rewritten around compiled kernels."""
