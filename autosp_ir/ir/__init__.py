"""The intermediate representation: types, operations, graphs, programs, text."""
