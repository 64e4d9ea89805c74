"""Find the values that edits write: their texts as tokens, the loss, its gradients, the optimisation."""
