"""Statistics and images that samples are compared with."""
