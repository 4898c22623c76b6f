"""Kernel tests that run compiled PTX on the CPU."""
