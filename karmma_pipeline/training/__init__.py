"""Store to model: teacher, baselines and distilled student share one loop."""
