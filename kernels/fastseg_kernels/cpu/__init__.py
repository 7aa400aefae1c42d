"""The CPU backend: kernels compiled by Numba. ``fastseg.dispatch.Backend`` types what it exports."""
