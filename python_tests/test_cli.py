"""The command line, in this process, with a small random model on disk."""

import json
import sys

import pytest
from model_zoo import *  # noqa: F403
