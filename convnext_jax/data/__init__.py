"""Data: sources of encoded images, transforms on the host, and the loader that makes batches.

The modules are imported one by one (`from convnext_jax.data.sources import open_source`): what runs
on the accelerator (`augment`, `mixing`) needs none of what reads files.
"""
