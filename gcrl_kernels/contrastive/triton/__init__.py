"""The contrastive losses in Triton. launchers.py is what the operators call."""
