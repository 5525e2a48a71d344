"""Surefoot: run, serve, prove and measure open LLMs on new accelerators.

Importing this package is cheap: torch and transformers are imported by the rooms that use them.
"""

__version__ = "0.1.0"
