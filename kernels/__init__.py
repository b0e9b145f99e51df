"""Device code and its launchers; imports as `dlgpu.kernels`."""
