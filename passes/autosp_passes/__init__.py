"""The built-in passes, found through the same entry point as anyone else's."""
