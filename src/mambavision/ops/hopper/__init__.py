"""Products of matrices, gathered from maps or not, by what only GPUs of the Hopper generation can do, in CUDA C++."""
