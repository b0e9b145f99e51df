"""The benchmark: providers, traffic meter, report and command line; imports as `dlgpu.bench`."""
