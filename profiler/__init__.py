"""What this device can do: memory, compute, link, power."""
