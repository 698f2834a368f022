"""From the IR back to FX, and to executable modules."""
