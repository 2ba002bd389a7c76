"""What runs in the worker's process: the standard library alone, nothing of torch and nothing of the rest of this package.

The worker imports this folder as a package of its own, ``process``, so these files import each other relatively and nothing else.
"""
