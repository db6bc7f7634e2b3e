"""Episodes, their collector, and their evaluation."""
