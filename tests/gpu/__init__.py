"""What needs a CUDA device, and the script that measures there."""
