"""A recipe from its file to its report."""
