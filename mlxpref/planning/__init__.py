"""What a run will take, before it starts: steps, memory by part, time, and what to change where it does not fit.

Memory is arithmetic on a model's sizes and a plan's shapes; nothing is loaded for it. Time is measured on a few of
the plan's own micro-batches, or reckoned from a speed that is known.
"""
