"""The text of programs: print, parse, compare, describe."""

from autosp_ir.ir.printer import FORMAT_VERSION, describe_node, print_program

__all__ = ["FORMAT_VERSION", "describe_node", "print_program"]
