"""A module that sets up its process when it is imported, as some libraries do."""

import logging
import sys

PLACE = "/a/folder/of/its/own"
sys.path.append(PLACE)
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
