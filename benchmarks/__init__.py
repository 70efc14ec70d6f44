"""Speed, as ratios to raw Ray in the same run."""
