"""Benchmarks of the kernels and of a training step beside the field's best; see README.md here."""
