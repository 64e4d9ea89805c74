"""Edits that were made, kept: undone and redone, as a folder, an adapter, in a checkpoint, in a journal."""
