"""Comparison with fixtures made by the PyTorch reference: ``python -m tests.parity DIR``.

One module per fixture folder computes the fixture's tensors through ``convert_weights``, the public modules and the
sampler's ``run``; ``runner`` compares them by the limits of ``limits``.  Nothing here computes a network a second way.
"""
