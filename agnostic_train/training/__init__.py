"""Which neurons learn, and training of these alone; the baselines that train otherwise."""
