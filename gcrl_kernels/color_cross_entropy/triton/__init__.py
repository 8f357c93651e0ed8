"""The colour-quantised cross-entropy in Triton. launchers.py is what the operators call."""
