"""Published PyTorch weights as Flax parameters, and back, without PyTorch and without its pickles.

`reading` opens a file, a URL or a hub name as memory-mapped NumPy arrays; a layout names them; the
programs stand above.
"""
