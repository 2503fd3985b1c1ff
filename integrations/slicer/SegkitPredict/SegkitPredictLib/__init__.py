"""The parts of the extension that do not need 3D Slicer: environment, process and results.

They use only Python's standard library, 3.9 or newer, so they run in Slicer's Python and in tests.
"""
