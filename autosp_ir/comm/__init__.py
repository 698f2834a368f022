"""Communication: the autosp:: operators, their layouts, process groups, and lowering.

Importing this package registers `torch.ops.autosp.*`.
"""

from autosp_ir.comm import attention as attention
from autosp_ir.comm import chunk_loop as chunk_loop
from autosp_ir.comm import chunks as chunks
from autosp_ir.comm import grouped_products as grouped_products
from autosp_ir.comm import host_memory as host_memory
from autosp_ir.comm import ops as ops
from autosp_ir.comm import random_masks as random_masks
from autosp_ir.comm import wide_products as wide_products
