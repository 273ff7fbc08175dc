"""What attention data predict: statistics of a traced run against measured damage."""
