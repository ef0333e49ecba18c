# Licensed under the Apache License, Version 2.0.
"""Code that the tools share, with a module per concern."""
