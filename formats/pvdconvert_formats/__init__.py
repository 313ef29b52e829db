"""The built-in checkpoint layouts: one file for each program whose files we read or write."""
