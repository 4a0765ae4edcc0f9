"""What a run would take on TPUs, found out by the TPU compiler on a machine that has none."""
