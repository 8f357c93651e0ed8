"""Axial attention in Triton. launchers.py is what the operators call."""
