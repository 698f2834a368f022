"""The text of programs: print, parse, compare, describe."""

from autosp_ir.ir.equality import structurally_equal
from autosp_ir.ir.parser import parse
from autosp_ir.ir.printer import FORMAT_VERSION, describe_node, format_type, print_program

__all__ = ["FORMAT_VERSION", "describe_node", "format_type", "parse", "print_program", "structurally_equal"]
