"""What the text examples share: data, metrics, models, loop, run folders. No part of the library."""
