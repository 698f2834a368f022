"""Pictures of programs and of what passes did to them."""
