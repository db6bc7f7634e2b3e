"""The operations of a model's layers: as tensor functions, compiled for a CPU, and in Triton; with
their gradients. `dispatch.kernels_for` chooses among them.
"""
