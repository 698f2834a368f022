"""From the IR back to FX, and to executable modules.

Importing this package lets loops over chunks run.
"""

from autosp_ir.emit import loops as loops
