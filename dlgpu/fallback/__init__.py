"""The ops on arrays: NumPy's on the CPU, CuPy's on a GPU that has no Triton. Arrays in, arrays out, no torch."""
