"""The labelling page: what is asked of whom, the file of labels, and the routes."""
