"""The commands: one small file each, and the only place that joins families with training and evaluation."""
