"""A store of edits that lives: its list and folders, and the joint write that an edit can be taken out of."""
