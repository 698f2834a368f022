"""The rules of `canonicalize`, one family per file."""
