"""What can be known before a run is started: the checks of `python -m convnext_jax.doctor`.

Each file looks at one thing and knows nothing of the others. A check is a function that returns a
`Finding` or raises a `UserError`; it runs by an `Examination`, which keeps its failure from hiding
the rest. What concerns several processes is compared after their findings have been exchanged.
"""
