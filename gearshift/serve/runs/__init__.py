"""The run page: a run's files, its episodes token by token, its held-out rows, and the routes."""
