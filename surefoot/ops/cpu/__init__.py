"""Implementations of ops for CPUs, registered when this package is imported."""
