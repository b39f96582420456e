"""Speed, memory and recall against other libraries, measured as ratios within one run."""
