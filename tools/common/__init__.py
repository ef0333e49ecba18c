# Licensed under the Apache License, Version 2.0.
"""What the tools share, by concern."""
