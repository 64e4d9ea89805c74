"""Where torch finds the operators: `torch.ops.<NAMESPACE>`."""

# The package's own name, whatever it was imported as: two copies in one process, as the Hub's loader makes
# them, do not define the same operators twice.
NAMESPACE = __package__.replace(".", "_")
