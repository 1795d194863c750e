"""An attack on everything that is read from files or typed: seeded mutants, run one by one under limits, and counted.

Invariant: a mutant is made from its number and the seed alone, so that a fault can be repeated; what counts as a fault is
decided in ``verdicts``.  The generators know the file formats and nothing of the readers under test.
"""
