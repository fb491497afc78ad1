"""The convolution by what only GPUs of the Hopper generation can do, in CUDA C++."""
