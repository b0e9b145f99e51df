"""Public functions: checks, the dispatcher's ops and their autograd, one module a stem."""
