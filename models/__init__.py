"""The architectures, and the parts that they share. Imports torch only."""
