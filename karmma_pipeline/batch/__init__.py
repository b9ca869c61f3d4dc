"""Whole roads as batch jobs: a chain of stages, sent to Slurm or run on this machine."""
