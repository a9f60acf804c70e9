"""What ``bench_step.py`` and ``bench_run.py`` measure with: shapes, contestants, a gate before each step, tables.

A contestant lives in a process of its own (``worker``) and waits at a gate; who measures (``measuring``) lets one
step through at a time, in turn. Trainers of other projects run as they are: they are only held where they take a batch.
"""
