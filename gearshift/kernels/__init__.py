"""The operations between matrix products: as tensor functions, compiled for a CPU, in Triton."""
