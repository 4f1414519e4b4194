"""Budgets: how many bits each matrix may keep. `conf/budget/` holds the presets."""
