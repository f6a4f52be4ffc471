"""Benchmarks of nfnets_kernels: every op, the whole training step and a real training run, each beside its peers.

``python -m benchmarks`` measures on the best device present and writes tables, JSON, CSV and plots into
``benchmarks/results/<machine>/``; ``python -m benchmarks --help`` lists the options.
"""
