"""The only place that knows transformers: loading, layers, projections, tokens, caches, hooks, generation."""
