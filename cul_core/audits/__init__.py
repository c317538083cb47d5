"""What forgetting did: scores, pictures and tables."""
