"""What `benchmarks.overlap` compares: programs, and torch's scheduler under our prices."""
