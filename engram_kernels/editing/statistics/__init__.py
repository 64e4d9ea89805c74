"""The layers' statistics: the text they come from, the moments, their files."""
