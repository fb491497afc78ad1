"""What only GPUs of the Hopper generation can do: products of matrices by their own instructions, in CUDA C++."""
