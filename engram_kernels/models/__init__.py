"""What the systems share: models loaded, their layers found, tensors digested, folders written whole."""
