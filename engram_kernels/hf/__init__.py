"""The only place that knows transformers: loading, layers, projections, tokens, caches, forward passes."""
