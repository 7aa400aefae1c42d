"""The kernels of fastseg: one package per backend, and the float64 reference.

Nothing here imports ``fastseg``; no backend imports another. Importing this package imports no
backend: ``fastseg.dispatch`` imports the one that an array asks for.
"""
