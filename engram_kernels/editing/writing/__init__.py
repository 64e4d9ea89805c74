"""Write values into a model's matrices: the key, the preconditioner, the low-rank write, its record."""
