"""`python -m nfnets_kernels`: what was built, and what serves each op and why."""

from .backend import describe

print(describe())
