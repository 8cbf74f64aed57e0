"""A training as a job of Slurm: submitted, waited for, cancelled, and submitted again where it was stopped.

Only Slurm's own commands are used, with lists of arguments. Its job script is a fixed file: nothing is filled in, and
nothing is pickled.
"""
