"""Products of matrices, gathered from maps or not, and attention in windows, by what only Hopper GPUs can do."""
