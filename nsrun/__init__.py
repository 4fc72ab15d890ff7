"""Put a command, a container or a whole host behind Tor, and prove that nothing leaks.

This file is imported on the hot path of ``ttp run``: it holds the version and nothing else.
"""

__version__ = "0.1.0"
