"""Every op as Triton kernels: they run on any GPU that Triton knows and are compiled at first use.

Imported by `ops/` at the first call that Triton serves, since importing Triton takes half a second.
"""
