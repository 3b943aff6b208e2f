"""The commands of the command line, one module each.

None of these modules imports torch, or anything else that is slow to import, before its command runs. So
help texts and errors about options appear at once.
"""
