"""One rank's arithmetic: each function takes local arrays and knows nothing of ranks."""
